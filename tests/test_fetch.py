"""Fetching files and URLs, the latter from a server on this machine: no test here needs a network."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Barrier, Thread

import pytest

from infera_gpu import _download
from infera_gpu.errors import FetchError, UnreachableError
from infera_gpu.fetch import cache_dir, fetch

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
        ("no/such/model.onnx", "'no/such/model.onnx': no such file"),
        ("nomodel", "`infera pull` lists it"),
        (".", "is a folder"),
        ("file://elsewhere/model.onnx", "not of 'elsewhere'"),
        ("ftp://host/model.onnx", "cannot fetch from 'ftp://'"),
        ("http://example.invalid/model.onnx", "for this machine only"),
        ("https://me:secret@example.invalid/model.onnx", "credentials in a URL"),
        ("https://me:secret@[::1/x", "https://...@[::1/x: not a URL that can be asked: Invalid IPv6 URL"),
        ("file://[::1/x", "Invalid IPv6 URL"),
        ("http://localhost:abc/x", "Port could not be cast to integer value as 'abc'"),
        ("https://host:70000/x", "Port out of range"),
        (f"https://{'a' * 80}.invalid/x", "the host is not a name: "),
        ("https://a..invalid/x", "the host is not a name: "),
        ("http://local host/x", "'local host' is not a host"),
        ("https:///x", "it names no host"),
        ("~nobody-of-that-name/model.onnx", "no such file"),
    ],
)
def test_what_is_no_source_is_refused_with_a_reason(source: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=re.escape(says)) as caught:
        fetch(source, cache=tmp_path)
    assert "secret" not in str(caught.value)
    assert not isinstance(caught.value, UnreachableError)


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
        self.thread = Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def stop(self) -> None:
        """Closes the port. Again is no error."""
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

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
    yield made
    made.stop()


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


def test_a_url_is_sent_in_ascii(site: Site, tmp_path: Path) -> None:
    sent = "/caf%C3%A9%20%41/m.onnx?v=%C3%BC&w=1"
    site.put(sent, CONTENT)
    assert fetch(site.url + "/café %41/m.onnx?v=ü&w=1#part", cache=tmp_path).read_bytes() == CONTENT
    assert site.asked == [sent]
    assert _download.sendable("https://bücher.example:8080/é") == "https://xn--bcher-kva.example:8080/%C3%A9"


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


@pytest.mark.parametrize("origin", ["unchanged", "gone", "out of reach"])
def test_a_wrong_pin_costs_no_kept_file(site: Site, tmp_path: Path, origin: str) -> None:
    url = site.put("/m.onnx", CONTENT)
    kept = fetch(url, cache=tmp_path)
    if origin == "gone":
        site.answers.clear()
    if origin == "out of reach":
        site.stop()
    says = {"unchanged": OTHER_SUM, "gone": "answered 404", "out of reach": "no answer"}[origin]
    with pytest.raises(FetchError, match=f"{SUM}.*{OTHER_SUM}.*left as it is.*{says}") as caught:
        fetch(url, sha256=OTHER_SUM, cache=tmp_path)
    assert isinstance(caught.value, UnreachableError) == (origin == "out of reach")
    assert files_under(tmp_path) == [kept]
    assert fetch(url, sha256=SUM, cache=tmp_path).read_bytes() == CONTENT


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
    for target in ("http://example.invalid/m.onnx", secret.as_uri(), "https://[::1/x", "https://a:b/x", "https:///x"):
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
    with pytest.raises(FetchError, match="cannot be put into the cache"):
        fetch(site.put("/m.onnx", CONTENT), cache=tmp_path / "file" / "cache")
