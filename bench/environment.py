"""What a measurement depends on, without naming the machine: commit, processor, versions, load."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
CHANGED = "+changes"
"""Behind a commit that was measured with changes to it."""
SCHEMA = 1
PACKAGES = ("infera-gpu", "numpy", "numba", "onnx", "onnxruntime", "triton", "cupy-cuda12x", "cupy-cuda13x")
VECTOR_FLAGS = ("avx512_vnni", "avx512f", "avx2", "sve", "asimd")
"""Widest first: what decides how fast a processor multiplies matrices."""
THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS")


def thread_environment(threads: int) -> dict[str, str]:
    """The environment of a child process whose libraries shall use so many threads."""
    return {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(threads))}


def environment() -> dict[str, Any]:
    """Fields for a results file."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "host_class": host_class(),
        "cpu": cpu_model(),
        "cpus": os.cpu_count(),
        "vector": vector_extension(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := package_version(name))},
        "blas": blas(),
        "load": load(),
    }


DATED = re.compile(r"\d{4}-\d{2}-\d{2}\.json")


def write_results(
    measured: Mapping[str, Any],
    options: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    out: Path | None = None,
    topic: str = "",
) -> Path:
    """A results file; without `out`, bench/results/<host class>-<topic>-<date>.json. `measured` is `environment()` from
    before the first row.

    The newest results of a topic are what documents are made of: those that lack models or servers that it has, or that
    failed, go into the folder `partial` beside it instead.
    """
    start = "-".join(p for p in (host_class(), topic) if p)
    name = f"{start}-{datetime.now(UTC):%Y-%m-%d}.json"
    before = [path for path in RESULTS.glob(f"{start}-*.json") if DATED.fullmatch(path.name.removeprefix(f"{start}-"))]
    known = json.loads(max(before).read_text())["rows"] if before else []
    whole = _subjects(known) <= _subjects(rows) and not any(row.get("failure") for row in rows)
    path = out or (RESULTS if whole else RESULTS / "partial") / name
    path.parent.mkdir(parents=True, exist_ok=True)
    made = {"schema": SCHEMA, "environment": measured, "options": options, "rows": rows, "load_after": load()}
    path.write_text(json.dumps(made, indent=1) + "\n")
    return path


def _subjects(rows: Sequence[Mapping[str, Any]]) -> set[str]:
    """The models or servers that rows are about."""
    return {str(row[key]) for row in rows for key in ("model", "server") if key in row}


def commit() -> str:
    """The commit, with CHANGED behind it where tracked files other than results differ from it; outside a checkout what
    the environment's INFERA_COMMIT says, which goes before, or "unknown"."""
    if named := os.environ.get("INFERA_COMMIT"):
        return named
    root = Path(__file__).parent.parent

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        head, changed = (
            git("rev-parse", "HEAD"),
            git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results"),
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + (CHANGED if changed else "")


def host_class() -> str:
    """Machines whose results may be compared: processor model and count, as part of a file name."""
    name = f"{cpu_model()} {vector_extension()} {os.cpu_count()}cpu".lower()
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)|processor|cpu @.*?hz", "", name)).strip("-")


def cpu_model() -> str:
    """As the system names it."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def vector_extension() -> str:
    """The widest of VECTOR_FLAGS that the processor has."""
    flags = (_cpuinfo("flags") or _cpuinfo("Features")).split()
    return next((flag for flag in VECTOR_FLAGS if flag in flags), "unknown")


def _cpuinfo(key: str) -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    found = re.search(rf"^{key}\s*:\s*(.*)$", text, re.MULTILINE)
    return found[1].strip() if found else ""


def package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def blas() -> list[dict[str, Any]]:
    """The BLAS libraries that NumPy loaded."""
    import numpy  # noqa: F401  (loads its BLAS)
    from threadpoolctl import threadpool_info

    keys = ("internal_api", "version", "architecture", "threading_layer")
    return [{k: lib[k] for k in keys if k in lib} for lib in threadpool_info() if lib["user_api"] == "blas"]


def load() -> list[float]:
    """Load averages over 1, 5 and 15 minutes; empty where the system has none."""
    return [round(v, 2) for v in os.getloadavg()] if hasattr(os, "getloadavg") else []
