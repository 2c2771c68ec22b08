"""`python -m tests.gpu_sections`: sections that fail in every way, for tests/test_gpu_workers.py. Needs no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from bench.gpu_command import command
from bench.gpu_operators import swept
from bench.gpu_report import CheckFailed, Context, Section
from bench.gpu_workers import Limits
from infera_gpu.ops import registry

ILLEGAL_ADDRESS = 700
REPLACED = 4

_faults: list[Exception] = []


class Fault(RuntimeError):
    """As CuPy tells of an error of CUDA."""

    status = ILLEGAL_ADDRESS


def fault() -> NoReturn:
    """CUDA works no more in this process."""
    _faults.append(Fault("cudaErrorIllegalAddress"))
    raise _faults[0]


def good(context: Context) -> tuple[str, Mapping[str, Any]]:
    odd = {"steps": Counter("abca"), "tiles": {(64, 64): np.float32(0.5)}, "left": context.left(), "type": int}
    return f"process {os.getpid()}", {"process": os.getpid(), **odd}


def crash(context: Context) -> tuple[str, Mapping[str, Any]]:
    print("about to die", file=sys.stderr, flush=True)
    os.abort()


def losing(context: Context) -> tuple[str, Mapping[str, Any]]:
    try:
        fault()
    except Fault as error:
        raise CheckFailed("a fault that a section took for a wrong result", {"error": str(error)}) from error
    return "", {}


def hanging(context: Context) -> tuple[str, Mapping[str, Any]]:
    time.sleep(600)
    return "", {}


def lasting(context: Context) -> tuple[str, Mapping[str, Any]]:
    """Starts a process, writes both numbers to the file that the environment names, and does not end."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    name = os.environ["GPU_PROCESSES"]
    Path(f"{name}.part").write_text(f"{os.getpid()} {child.pid}")
    os.replace(f"{name}.part", name)
    time.sleep(600)
    return "", {}


def case(name: str) -> int:
    """1, or what the name says."""
    if name == "dies":
        os.abort()
    if name == "faults":
        fault()
    if name == "hangs":
        time.sleep(600)
    if name == "wrong":
        raise AssertionError("not equal")
    return 1


CASES = ("first", "dies", "second", "faults", "wrong", "hangs", "last")


def cases(context: Context) -> tuple[str, Mapping[str, Any]]:
    tried = {name: context.cases.run(name, partial(case, name), 2) for name in CASES if not context.cases.known(name)}
    known = {name: context.cases.known(name) or tried[name] for name in CASES}
    problems = {name: t.problem for name, t in known.items()}
    facts = {"problems": problems, "here": list(tried)}
    if any(problems.values()):
        raise CheckFailed("some fail", facts)
    return "all well", facts


def always(context: Context) -> tuple[str, Mapping[str, Any]]:
    """Every case is a fault."""
    for i in range(1000):
        if not context.cases.known(f"case {i}"):
            context.cases.run(f"case {i}", fault)
    return "", {}


def dragging(context: Context) -> tuple[str, Mapping[str, Any]]:
    """Every case takes a second and is a fault."""
    names = [f"case {i}" for i in range(1000)]
    for name in names:
        if not context.cases.known(name) and context.left() > 0:
            time.sleep(1)
            context.cases.run(name, fault)
    raise CheckFailed("faults", {"tried": [name for name in names if context.cases.known(name)]})


def overtime(context: Context) -> tuple[str, Mapping[str, Any]]:
    """Loses the GPU when the time is over."""
    time.sleep(context.left() + 0.1)
    return losing(context)


def swept_cases(context: Context) -> tuple[str, Mapping[str, Any]]:
    """Cases of two operators, one of which faults in every case."""
    operators = [op for op in registry() if op.name in ("Abs", "Exp")]
    checked = [
        (op, f"{op.name}-{op.since} {i}", fault if op.name == "Abs" else partial(case, "well"))
        for op in operators
        for i in range(3)
    ]
    return swept(context, "cases", checked, "idle")


SECTIONS: Mapping[str, Section] = {
    "good": good,
    "crash": crash,
    "losing": losing,
    "hanging": hanging,
    "lasting": lasting,
    "cases": cases,
    "always": always,
    "dragging": dragging,
    "overtime": overtime,
    "swept": swept_cases,
    "last": good,
}


def why_unavailable() -> str | None:
    """As the environment says: the GPU is gone after a file appears, or asking for it in a worker does not end."""
    gone = os.environ.get("GPU_GONE_AFTER")
    if os.environ.get("GPU_WEDGED") and "--worker" in sys.argv:
        time.sleep(600)
    return "it fell off the bus" if gone and os.path.exists(gone) else None


def main(argv: Sequence[str] | None = None) -> int:
    return command(
        argv,
        prog="tests.gpu_sections",
        description="fail",
        sections=SECTIONS,
        minutes=1,
        seconds={"hanging": 1, "dragging": 3},
        unavailable=why_unavailable,
        describe=lambda index: {"name": "NVIDIA H200", "driver": "580.1"},
        reading=lambda index: {"sm_clock": 1980},
        lost=lambda index: bool(_faults),
        limits=Limits(grace=2, start=float(os.environ.get("GPU_WEDGED") or 60), replaced=REPLACED),
    )


if __name__ == "__main__":
    sys.exit(main())
