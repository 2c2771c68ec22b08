"""`python -m bench.resident`: the most memory that a process has in use which loads a model and runs it at batch 8.

Every figure is from a fresh process: imports, a model loaded from its file, runs for some seconds. `imported` is what
the imports took, `peak` all of it, both in bytes of resident memory at their highest, and with what worker processes
have to themselves at the end. With numba installed the kernels that it
compiles are measured as well, and never in NumPy's place.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.environment import environment, thread_environment, write_results
from bench.inputs import Feeds, image, tokens
from bench.models import path_of

BATCH = 8
RUNS, SECONDS = 3, 3.0
"""At least so many runs, and for so long: worker processes are started in the second one."""

FEEDS: Mapping[str, Callable[[np.random.Generator], Feeds]] = {
    "resnet50": lambda rng: {"image": image(rng, BATCH, 3, 224, 224, low=-2, high=2.5)},
    "bert-base": lambda rng: tokens(rng, [128, 90, 17, 128, 64, 33, 101, 120], types=True),
}


def infera(path: str, threads: int, *, jit: bool = False) -> Callable[[Feeds], object]:
    import infera_gpu

    session = infera_gpu.load(path, device="cpu", threads=threads, jit=jit)
    return session.run


def onnxruntime(path: str, threads: int) -> Callable[[Feeds], object]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda feeds: session.run(None, feeds)


RUNTIMES: Mapping[str, tuple[str, Callable[[str, int], Callable[[Feeds], object]]]] = {
    "infera": ("infera_gpu", infera),
    "infera[jit]": ("infera_gpu", partial(infera, jit=True)),
    "onnxruntime": ("onnxruntime", onnxruntime),
}


def runtimes() -> list[str]:
    """Names of RUNTIMES that are installed here."""
    from infera_kernels.jit import installed

    return [name for name in RUNTIMES if installed() or name != "infera[jit]"]


def peak() -> int:
    """The most bytes that this process has had resident.

    Linux carries `ru_maxrss` over from the process that started this one, so its own mark is read where there is one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def children() -> int:
    """Bytes that processes which this one has started have to themselves."""
    total = 0
    for task in Path("/proc/self/task").glob("*/children"):
        for child in task.read_text().split():
            lines = Path("/proc", child, "smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))
    return total


def measure(runtime: str, model: str, path: str, threads: int) -> dict[str, Any]:
    """One row; to be called in a fresh process."""
    module, load = RUNTIMES[runtime]
    __import__(module)
    feeds = FEEDS[model](np.random.default_rng(0))
    imported = peak()
    run = load(path, threads)
    loaded = peak()
    began, runs = time.monotonic(), 0
    while runs < RUNS or time.monotonic() < began + SECONDS:
        run(feeds)
        runs += 1
    return {
        "runtime": runtime,
        "model": model,
        "threads": threads,
        "imported": imported,
        "loaded": loaded,
        "peak": peak() + children(),
    }


def child(*job: str) -> dict[str, Any]:
    """`measure` in a process of its own."""
    command = [sys.executable, "-m", "bench.resident", "--job", *job]
    done = subprocess.run(command, env=thread_environment(int(job[-1])), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser("python -m bench.resident", description=__doc__)
    parser.add_argument("models", nargs="*", choices=[[], *FEEDS])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--job", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        runtime, model, path, threads = options.job
        print(json.dumps(measure(runtime, model, path, int(threads))))
        return
    measured, rows = environment(), []
    for model in options.models or FEEDS:
        path = os.fspath(path_of(model))
        for threads in options.threads:
            for runtime in runtimes():
                rows.append(row := child(runtime, model, path, str(threads)))
                own = (row["peak"] - row["imported"]) / 2**20
                print(
                    f"{model}, batch {BATCH}, threads {threads}, {runtime}: {own:.0f} MiB above the imports' "
                    f"{row['imported'] / 2**20:.0f} MiB, {row['peak'] / 2**20:.0f} MiB in all",
                    flush=True,
                )
    print(write_results(measured, {"batch": BATCH, "runs": RUNS, "seconds": SECONDS}, rows, options.out, "resident"))


if __name__ == "__main__":
    main()
