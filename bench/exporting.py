"""What the scripts that export models have in common: the command line, the files, what happens when an export fails.

`bench.exporters_torch` and its siblings run in Pythons of their own with their framework, and need nothing else that is
here but NumPy. `bench.exporters_report` says how the examples are laid out, and reads them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.architecture import Architecture, Array

SEED = 0
Arrays = Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class Framework:
    """`export(architecture, exporter, path, feeds)` writes the model to `path`, and gives what goes in and comes out.

    That is one pair for every one of the feeds: the inputs as the file takes them, mostly by the names and with the
    axes of the feeds, and the framework's own outputs as the file gives them. The first of the feeds has the sizes to
    export with. It raises what the exporter raises.
    """

    name: str
    versions: str
    """Of the framework and its exporter, as the report is to name them."""
    architectures: Mapping[str, Architecture]
    exporters: Collection[str]
    export: Callable[[Architecture, str, Path, Sequence[Arrays]], Sequence[tuple[Arrays, Arrays]]]

    def applies(self, name: str, exporter: str) -> bool:
        """Whether the exporter writes anything of its own for this architecture."""
        only = self.architectures[name].exporters
        return not only or exporter in only


def write(framework: Framework, name: str, exporter: str, folder: Path) -> None:
    """One model, and its examples beside it; neither stays from before where the export fails."""
    architecture = framework.architectures[name]
    path = folder / f"{name}-{exporter}.onnx"
    examples = path.with_suffix(".npz")
    for file in (path, examples):
        file.unlink(missing_ok=True)
    rng = np.random.default_rng(SEED)
    feeds = [{k: v.array(rng, sizes) for k, v in architecture.inputs.items()} for sizes in architecture.sizes]
    stored: dict[str, Any] = {}
    for i, (given, made) in enumerate(framework.export(architecture, exporter, path, feeds)):
        stored |= {f"{i}/in/{k}": v for k, v in given.items()}
        stored |= {f"{i}/out/{k}": v for k, v in made.items()}
    about = {
        "framework": framework.name,
        "versions": framework.versions,
        "model": name,
        "exporter": exporter,
        "summary": architecture.summary,
        "sizes": [dict(sizes) for sizes in architecture.sizes],
    }
    np.savez(examples, about=np.array(json.dumps(about)), **stored)


def reason(error: BaseException) -> str:
    """The first line of what is at the bottom of it: the exporters wrap errors in advice."""
    while error.__cause__:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def main(framework: Framework, prog: str, description: str, argv: Sequence[str] | None) -> int:
    """0 when everything was exported, else 1."""
    architectures = framework.architectures
    parser = argparse.ArgumentParser(prog, description=description)
    parser.add_argument("folder", type=Path, metavar="OUT_DIR")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(architectures)}; all unless given")
    parser.add_argument("--exporters", nargs="+", choices=list(framework.exporters), default=list(framework.exporters))
    options = parser.parse_args(argv)
    unknown = [name for name in options.names if name not in architectures]
    if unknown:
        parser.error(f"there is no architecture {unknown[0]}; the table has {', '.join(architectures)}")
    options.folder.mkdir(parents=True, exist_ok=True)
    todo = [
        (name, e) for name in options.names or architectures for e in options.exporters if framework.applies(name, e)
    ]
    failures = 0
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    for i, (name, exporter) in enumerate(todo, 1):
        print(f"[{i}/{len(todo)}] {name} by {exporter} ... ", end="", flush=True)
        started, said = time.monotonic(), io.StringIO()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                write(framework, name, exporter, options.folder)
        except Exception as error:  # every exporter has exceptions of its own
            failures += 1
            print(f"failed after {time.monotonic() - started:.1f} s: {reason(error)}")
        else:
            print(f"{time.monotonic() - started:.1f} s")
    print(f"{len(todo) - failures} of {len(todo)} exported to {options.folder}")
    return 1 if failures else 0
