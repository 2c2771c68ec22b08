"""Measures one model with one number of threads, in a process of its own: `python -m bench.worker` with a job on stdin.

Prints one JSON row a line. The parent sets OPENBLAS_NUM_THREADS and its like, which libraries read when they load.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import onnx

import infera_gpu
from bench.inputs import EXAMPLES, UNSTABLE, Example
from bench.measure import Summary, interleave, summarize
from bench.models import path_of
from bench.reference import Reference
from infera_gpu.errors import InferaError
from infera_gpu.session import Session
from infera_gpu.verify import AGREEMENT, Difference, OnnxRuntime, compare
from infera_kernels.jit import installed

OURS, COMPILED, PEER = "infera", "infera[jit]", "onnxruntime"
"""Contenders: with NumPy's kernels, with those that numba compiles where it is installed, and onnxruntime."""


@dataclass(frozen=True, slots=True)
class Job:
    """What to measure: both examples of the model, or the first alone."""

    model: str
    threads: int
    rounds: int
    block_s: float = 0.25
    examples: int = 2


@dataclass(slots=True)
class Row:
    """One model at one shape with one number of threads.

    `error` is infera's worst over all outputs, logits included, as a fraction of the output's peak; `peer_error` that
    of the optimised onnxruntime, over the model's own outputs; `compiled_error` is infera's with compiled kernels.
    `failure` says why there are no times; then `summaries` is empty.
    """

    model: str
    example: str
    threads: int
    shapes: dict[str, list[int]] = field(default_factory=dict)
    error: float | None = None
    peer_error: float | None = None
    compiled_error: float | None = None
    failure: str = ""
    summaries: dict[str, Summary] = field(default_factory=dict)
    arena_bytes: int | None = None
    lower_bound_bytes: int | None = None

    @property
    def ratios(self) -> dict[str, float]:
        """infera / onnxruntime: below one is faster."""
        if not self.summaries:
            return {}
        peer = self.summaries[PEER]
        return {
            f"{prefix}{clock}": getattr(self.summaries[name], f"{clock}_ms") / getattr(peer, f"{clock}_ms")
            for name, prefix in ((OURS, ""), (COMPILED, "compiled_"))
            if name in self.summaries
            for clock in ("wall", "cpu")
        }

    def as_dict(self) -> dict[str, Any]:
        """As JSON takes it, which has no infinity: an error without a size is null."""
        made = {**asdict(self), "summaries": {k: v.as_dict() for k, v in self.summaries.items()}, "ratios": self.ratios}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in made.items()}


def measure(job: Job, example: Example, row: Row) -> None:
    """Fills `row`. Outputs are compared before anything is timed, and a mismatch leaves the row without times, but for
    the UNSTABLE models.

    The reference runs without graph optimisations, the contender with all of them. Logits are compared in a session of
    their own: exposing them changes the model that is timed.
    """
    path = path_of(job.model)
    feeds = example.feeds()
    row.shapes = {name: list(array.shape) for name, array in feeds.items()}
    reference = Reference(onnx.load(path), job.threads)
    want = reference.run(feeds)
    peer = OnnxRuntime(path, threads=job.threads, optimized=True)
    theirs = peer.run(feeds)
    own = {name: want[name] for name in theirs}
    row.peer_error = max(d.error for d in compare(theirs, own))
    found: list[Difference] = []
    with ExitStack() as stack:

        def opened(jit: bool) -> tuple[Session, float]:
            """The model to be timed, and its worst error, intermediate logits included."""
            with infera_gpu.load(reference.payload, device="cpu", threads=job.threads, jit=jit) as exposed:
                differences = list(compare(exposed.run(feeds), want))
            session = stack.enter_context(infera_gpu.load(path, device="cpu", threads=job.threads, jit=jit))
            differences += compare(session.run(feeds), own)
            found.extend(differences)
            return session, max(d.error for d in differences)

        session, row.error = opened(jit=False)
        contenders: dict[str, Callable[[], object]] = {OURS: partial(session.run, feeds)}
        if installed():
            compiled, row.compiled_error = opened(jit=True)
            contenders[COMPILED] = partial(compiled.run, feeds)
        wrong = [str(d) for d in found if not d.within(AGREEMENT) and job.model not in UNSTABLE]
        if wrong:
            row.failure = f"outputs differ: {'; '.join(wrong)}"
            return
        contenders[PEER] = partial(peer.run, feeds)
        taken = interleave(contenders, rounds=job.rounds, block_s=job.block_s)
        plan = session.plan_for(feeds)
        row.arena_bytes, row.lower_bound_bytes = plan.arena_bytes, plan.lower_bound
    row.summaries = {name: summarize(samples) for name, samples in taken.items()}


def main() -> None:
    job = Job(**json.load(sys.stdin))
    for example in EXAMPLES[job.model][: job.examples]:
        row = Row(job.model, example.label, job.threads)
        try:
            measure(job, example, row)
        except InferaError as error:
            row.failure = f"{type(error).__name__}: {error}"
        print(json.dumps(row.as_dict()), flush=True)


if __name__ == "__main__":
    main()
