"""Which model files there are, and what they are served as."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from glob import escape
from pathlib import Path
from stat import S_ISREG
from types import MappingProxyType
from typing import TypeAlias

CONFIG_FILE = "config.pbtxt"
"""What Triton says of a model, in its folder."""

RESERVED = frozenset({"stats"})
"""Names in the place of a model that mean something else: `GET /v2/models/stats` is about all of them."""


def is_free(name: str) -> bool:
    """Whether `/v2/models/NAME` can mean a model; '.' and '..' are taken out of paths on their way."""
    return bool(name) and "/" not in name and name not in RESERVED | {".", ".."}


EMPTY: Mapping[Path, str] = MappingProxyType({})


class DiscoveryError(ValueError):
    """The paths do not say what to serve."""


@dataclass(frozen=True, slots=True)
class Source:
    """A model version's file and what it is served as.

    `folder` is the model's, where it has one: it may hold a `config.pbtxt`. With one, `path` may be the version's
    folder: then the configuration says which file of it is the model. Neither may lead outside `root`.
    """

    name: str
    version: str
    path: Path
    folder: Path | None = None
    root: Path | None = None

    def __str__(self) -> str:
        return f"{self.name} version {self.version}"


@dataclass(frozen=True, slots=True)
class Problem:
    """A source that cannot be served, and why, in UTF-8."""

    source: Source
    reason: str


@dataclass(frozen=True, slots=True)
class Survey:
    """What was found: sources by name and version, and what is wrong with others, by name."""

    sources: Sequence[Source]
    problems: Mapping[str, Problem]

    def of(self, name: str) -> list[Source]:
        """A model's versions, oldest first."""
        return [source for source in self.sources if source.name == name]


def discover(paths: Sequence[Path], names: Mapping[Path, str] = EMPTY) -> Survey:
    """The models at `paths`: ONNX files, folders of them, model folders (`NAME/1/model.onnx`) or folders of these.

    `names` are what files are served as instead of their own names. What is wrong with one model hides no other.
    Raises DiscoveryError where a path holds none that can be served, or models of two paths would have one name.
    """
    known: set[str] = set()
    for path in paths:
        if not path.exists():
            raise DiscoveryError(f"{path} does not exist")
        alone = survey([path], names)
        if not alone.sources:
            reasons = [problem.reason for problem in alone.problems.values()]
            none = f"{path} holds no model: expected .onnx files or NAME/VERSION/model.onnx"
            raise DiscoveryError(next(iter(reasons), none))
        known |= alone.problems.keys()
    found = survey(paths, names)
    for name, problem in found.problems.items():
        if name not in known:
            raise DiscoveryError(problem.reason)
    return found


def survey(paths: Sequence[Path], names: Mapping[Path, str] = EMPTY) -> Survey:
    """As `discover`, but a path may hold none, and models of two paths with one name are a problem like any other."""
    found: dict[tuple[str, str], Source] = {}
    problems: dict[str, Problem] = {}
    for path in paths:
        named = [Source(names[path], "1", path)] if path in names else list(_sources(path, problems))
        for source in named:
            if problem := _name_problem(source):
                problems[source.name] = Problem(source, problem)
                continue
            other = found.setdefault((source.name, source.version), source)
            if other is not source:
                both = f"{other.path} and {source.path} would both be served as {source}; rename one"
                problems[source.name] = Problem(source, both)
    ordered = sorted(found.values(), key=lambda s: (s.name, int(s.version)))
    told = [Problem(replace(p.source, name=_readable(p.source.name)), _readable(p.reason)) for p in problems.values()]
    return Survey([s for s in ordered if s.name not in problems], {problem.source.name: problem for problem in told})


def _readable(text: str) -> str:
    """The text where a file's name is UTF-8; else with marks for what is not."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


Stamp: TypeAlias = frozenset[tuple[str, int, int, int]]
"""Files as they were: path, size, time of the last change in ns, inode."""


def stamp(path: Path) -> Stamp:
    """The files of a model: one and those beside it that have the rest of its tensors, or all in a folder.

    None of them where a folder of it goes meanwhile.
    """
    found = set()
    try:
        files = list(path.rglob("*") if path.is_dir() else path.parent.glob(f"{escape(path.stem)}*"))
    except OSError:
        files = []
    for file in files:
        try:
            about = file.stat()
        except OSError:  # it has just gone
            continue
        if S_ISREG(about.st_mode):
            found.add((str(file), about.st_size, about.st_mtime_ns, about.st_ino))
    return frozenset(found)


def leads_outside(path: Path, root: Path) -> bool:
    """Whether a path, its links followed, is not below `root`."""
    return not path.resolve().is_relative_to(root.resolve())


def _name_problem(source: Source) -> str:
    """What the protocol cannot say in a name; empty where it can."""
    try:
        source.name.encode()
    except UnicodeEncodeError:
        return f"{str(source.path)!a} is not named in UTF-8; rename it"
    if not is_free(source.name):
        return f"{source.path} would be served at /v2/models/{source.name}, which is taken; rename it"
    if source.root is not None and leads_outside(source.path, source.root):
        return f"{source.path} leads outside {source.root}; put the file itself there"
    return ""


def _is_model(path: Path) -> bool:
    return path.suffix.lower() == ".onnx" and path.is_file()


def _sources(path: Path, problems: dict[str, Problem]) -> Iterator[Source]:
    if path.is_file():
        yield Source(path.stem, "1", path)
    elif path.is_dir():
        own = list(versions(path, path, problems))
        yield from own
        if not own:
            for child in sorted(path.iterdir()):
                if _is_model(child):
                    yield Source(child.stem, "1", child, root=path)
                elif child.is_dir():
                    found = list(versions(child, path, problems))
                    yield from found
                    if not found and (file := next(filter(_is_model, sorted(child.iterdir())), None)):
                        lost = f"{file} is in no version's folder: move it to {child / '1' / file.name}"
                        problems.setdefault(child.name, Problem(Source(child.name, "1", file, child, path), lost))


def versions(folder: Path, root: Path, problems: dict[str, Problem], configured: bool = False) -> Iterator[Source]:
    """The versions in a model's folder: `model.onnx`, or the only .onnx file, in folders named by a number.

    Where there is a configuration every such folder is a version, whatever it holds.
    """
    name = folder.resolve().name if folder == root else folder.name
    configured = configured or (folder / CONFIG_FILE).is_file()
    for child in sorted(folder.iterdir()):
        if not (child.is_dir() and child.name.isascii() and child.name.isdigit() and int(child.name) > 0):
            continue
        files = sorted(filter(_is_model, child.iterdir()))
        named = [f for f in files if f.name == "model.onnx"] or files
        version = str(int(child.name))
        if len(named) == 1:
            yield Source(name, version, named[0], folder, root)
        elif configured:
            yield Source(name, version, child, folder, root)
        elif named:
            many = f"{child} holds {len(named)} .onnx files, none of them named model.onnx"
            problems[name] = Problem(Source(name, version, child, folder, root), many)
