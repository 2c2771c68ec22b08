"""What the rows measured on a CPU are to reach, as data, and why those that do not cannot."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from bench.models import BUILT

Rows: TypeAlias = Sequence[Mapping[str, Any]]
Judge: TypeAlias = Callable[[Rows], float | None]
"""One number of the rows of a results file; None where what it needs was not measured."""


def _largest(found: Sequence[float]) -> float | None:
    return max(found, default=None)


def ratio(model: str, threads: int, examples: Sequence[str] = ("b1",), key: str = "wall") -> Judge:
    """Time over onnxruntime's, the largest of some examples."""

    def judge(rows: Rows) -> float | None:
        chosen = (r for r in rows if (r["model"], r["threads"]) == (model, threads) and not r["failure"])
        return _largest(
            [r["ratios"][key] for r in chosen if r["example"].split()[0] in examples and key in r["ratios"]]
        )

    return judge


def trained(rows: Rows, threads: int, key: str) -> list[float]:
    """Time over onnxruntime's of the trained models' first examples."""
    firsts = {r["model"]: r for r in reversed(rows) if r["threads"] == threads and not r["failure"]}
    return [r["ratios"][key] for name, r in firsts.items() if name not in BUILT and key in r["ratios"]]


def mean(threads: int, key: str = "wall") -> Judge:
    """The geometric mean of those."""

    def judge(rows: Rows) -> float | None:
        found = trained(rows, threads, key)
        return statistics.geometric_mean(found) if len(found) > 1 else None

    return judge


def worst(column: str) -> Judge:
    """The largest value of a column."""
    return lambda rows: _largest([float(r[column]) for r in rows if not r.get("failure") and column in r])


def planning(rows: Rows) -> float | None:
    """Microseconds a node in the median, of the model for which it is most."""
    return _largest([r["new"]["planning_micros_a_node"]["median"] for r in rows if not r["failure"]])


def planning_by_onnx(rows: Rows) -> float | None:
    """The same, counted in what onnx took meanwhile to infer the outputs of a node."""
    found = [r["new"] for r in rows if not r["failure"] and "onnx_micros_a_node" in r["new"]]
    return _largest([new["planning_micros_a_node"]["median"] / new["onnx_micros_a_node"] for new in found])


def planning_of(model: str) -> Judge:
    """Milliseconds of planning a new shape of a model, in the median."""

    def judge(rows: Rows) -> float | None:
        found = [r for r in rows if r["model"] == model and not r["failure"]]
        return _largest([r["new"]["planning_micros_a_node"]["median"] * r["nodes"] / 1e3 for r in found])

    return judge


def memory(model: str, runtime: str = "infera") -> Judge:
    """Peak over onnxruntime's at as many threads, the largest."""

    def judge(rows: Rows) -> float | None:
        peaks = {(r["threads"], r["runtime"]): r["peak"] for r in rows if r["model"] == model}
        return _largest([p / peaks[t, "onnxruntime"] for (t, name), p in peaks.items() if name == runtime])

    return judge


def served(ours: str, peer: str, body: str, connections: int, column: str = "rps", peer_body: str = "") -> Judge:
    """A column of ours over the peer's; with no peer ours."""

    def judge(rows: Rows) -> float | None:
        found = {(r["server"], r["body"], r["connections"]): r[column] for r in rows}
        own, other = found.get((ours, body, connections)), found.get((peer, peer_body or body, connections))
        if own is None or (peer and other is None):
            return None
        return float(own / other) if other else float(own)

    return judge


def called(ours: str, peer: str, callers: int) -> Judge:
    """Processor time of a call over a peer's."""

    def judge(rows: Rows) -> float | None:
        found = {(r["server"], r["callers"]): r["cpu_us"] for r in rows}
        if (ours, callers) not in found or (peer, callers) not in found:
            return None
        return float(found[ours, callers] / found[peer, callers])

    return judge


def overloaded(engine: str, column: str) -> Judge:
    return lambda rows: next((float(r[column]) for r in rows if engine in r["engine"]), None)


def grown(rows: Rows) -> float | None:
    """Memory at the end of an overload over that after its first second, the largest."""
    return _largest([r["memory_end_mb"] / r["memory_after_1s_mb"] for r in rows if r.get("memory_after_1s_mb")])


@dataclass(frozen=True)
class Target:
    """What `judge` makes of the rows of the newest file of a topic is to be at least `goal`, or `at_most` that.

    Where the topic has no such rows those of `elsewhere` count. `unit` follows the number. `why` says what keeps it
    from being met where it is not.
    """

    work: str
    topic: str
    judge: Judge
    goal: float
    at_most: bool = True
    unit: str = ""
    why: str = ""
    elsewhere: tuple[str, ...] = ()

    @property
    def topics(self) -> tuple[str, ...]:
        """Where it is looked for, in this order."""
        return self.topic, *self.elsewhere

    def met(self, value: float) -> bool:
        """As well as the number is shown."""
        value = float(f"{value:.3g}")
        return value <= self.goal if self.at_most else value >= self.goal


_MEMORY = (
    "Nearly all of it are products, whose weights come from memory anew each time. OpenBLAS' loops wait for them, and "
    "NumPy has nothing that fetches memory while it computes: the faster a processor is beside its memory, the more "
    "this counts."
)
_FIRST = (
    "Planning and binding are Python, a fraction of a millisecond a node: what is left of it on models of a few "
    "milliseconds. yunet's convolutions are hundreds of calls."
)
_NUMBA = (
    "In each process numba compiles its own runtime and links every function that it has kept anew, some milliseconds "
    "each, whatever the model: `load(jit=False)` is for a process that runs little."
)
_COMPILER = (
    "numba and LLVM alone take about 100 MB, whatever the model; and since 6c73b9d693 the weights of all products lie "
    "in panels beside the model's own, which is what makes them fast."
)
_PLANNING = (
    "Planning is Python with no step that stands out: inferring shapes, binding each kernel to learn what scratch it "
    "wants, places in memory. Convolutions are the dearest to bind."
)
_ALONE = (
    "One request at a time finds Python's data and code in the farther cache, since the model's 2 MB of weights went "
    "through the nearer one: next to no model takes less than half as long."
)
_TORCHSERVE = (
    "Its front end is Java and batches; eight times as much is more than a bare handler under uvicorn answers."
)
_LOCK = (
    "Each step of a run gives the interpreter's lock away and takes it back, for which it waits while a request is "
    "refused: what the thread that runs the model had of a processor at the peak and while overloaded are rows of the "
    "table from results after 2026-11-29 on, and their difference is that wait. The rest is that two busy processors "
    "are slower each than one, of which the load generator takes a part: a process of its own (`--isolate`), which "
    "waits for no lock, does not reach its peak either."
)
_GRPC = (
    "Row `handler`, in results after 2026-11-29, is a handler of ten lines that only reads the message, picks and "
    "answers, which shows what gRPC's library takes. infera's call passes the queue, limits, a deadline, counters and "
    "the explanation besides: Python functions whose code a lone call finds in the farther cache, the more so when the "
    "process slept before it. Calls that wait together share that."
)
_BARE_JSON = "784 numbers are parsed, and an array is made of them: the bare handler only takes their bytes."
_BARE_ALONE = (
    "With one connection a run of a model, its queue, limits and counters stand against a handler that does nothing; "
    "with more, runs are shared."
)
_BARE_HOT = "What known heads save in reading a request is spent on its queue, its counters and its share of a run."

OLDER = {
    "f43156dc9d": "weights were laid out once for OpenBLAS' inner loops (f90218f6ca)",
    "542aefef7b": (
        "planning and binding asked less of each node (2972e2749c) and graphs and plans of small models were kept "
        "(8746edc524, 0dc414ca7a)"
    ),
    "91988a4aa1": (
        "weights were laid out once (f90218f6ca), a run's fixed cost fell (a33b4a736d) and results were accounted for "
        "after the replies (b01d8521a4, 7a43307d88)"
    ),
    "ca4aee5b4b": (
        "refused requests left no garbage, whose collection stopped a loaded server (0bf1a96276), and a full queue's "
        "refusal was sent again as it was (459952ed78)"
    ),
}
"""By the commit that results are of, where no later ones of their machine exist: before what that was."""

_SPEEDS = (
    ("BERT-base, 128 tokens, batch 1 and 8", "bert-base", ("b1", "b8"), 1.10, 1.25, _MEMORY),
    ("ResNet-50, batch 1 and 8", "resnet50", ("b1", "b8"), 1.15, 1.35, _MEMORY),
    ("VGG-19", "vgg19", ("b1",), 0.65, 0.90, _MEMORY),
    ("SqueezeNet", "squeezenet", ("b1",), 1.6, 2.0, ""),
    ("MobileNetV2", "mobilenetv2-zoo", ("b1",), 2.5, 3.5, ""),
    ("GPT-2, one token after 255", "gpt2-step", ("b1",), 1.3, 1.5, ""),
)

TARGETS = (
    *(
        Target(f"{name}, {threads} thread{'s' * (threads > 1)}", "", ratio(model, threads, examples), goal, why=why)
        for name, model, examples, *goals, why in _SPEEDS
        for threads, goal in zip((1, 2), goals, strict=True)
    ),
    Target("mean of the trained models, 1 thread", "quick", mean(1), 1.8),
    Target("mean of the trained models, 2 threads", "quick", mean(2), 2.2),
    Target(
        "with numba: BERT-base, batch 1 and 8, 1 thread", "",
        ratio("bert-base", 1, ("b1", "b8"), "compiled_wall"), 1.0, why=_MEMORY,
    ),
    Target("with numba: MobileNetV2, 1 thread", "", ratio("mobilenetv2-zoo", 1, ("b1",), "compiled_wall"), 1.8),
    Target("load and first inference, the worst model", "first", worst("ratio"), 1.5, why=_FIRST),
    Target("the same of a model that is new on the machine", "first", worst("new_ratio"), 1.5, why=_FIRST),
    Target("with numba: load and first inference, the worst model", "first", worst("compiled_ratio"), 1.5, why=_NUMBA),
    Target("planning a new shape, microseconds a node", "shapes", planning, 100, why=_PLANNING),
    Target("the same, in times of onnx's `infer_node_outputs`", "shapes", planning_by_onnx, 7.14, why=_PLANNING),
    Target("planning a new shape of BERT-base, ms", "shapes", planning_of("bert-base"), 40),
    Target("planning a new shape of 5,000 nodes, ms", "shapes", planning_of("deep-bert"), 500, why=_PLANNING),
    Target("peak memory of ResNet-50, batch 8", "resident", memory("resnet50"), 1.0),
    Target("peak memory of BERT-base, batch 8", "resident", memory("bert-base"), 1.0),
    *(
        Target(f"with numba: {title}, batch 8", "resident", memory(model, "infera[jit]"), 1.0, why=_COMPILER)
        for title, model in (("peak memory of ResNet-50", "resnet50"), ("peak memory of BERT-base", "bert-base"))
    ),
    Target(
        "requests/s, binary, 64 connections, over tritonserver's", "serving",
        served("infera", "triton", "binary", 64), 1.5, at_most=False,
    ),
    Target("processor time of such a request, µs", "serving", served("infera", "", "binary", 64, "cpu_us"), 75),
    Target(
        "median latency, binary, 1 connection, over tritonserver's", "serving",
        served("infera", "triton", "binary", 1, "p50_ms"), 0.6, why=_ALONE,
    ),
    Target(
        "requests/s, JSON, 64 connections, over tritonserver's", "serving",
        served("infera", "triton", "json", 64), 1.2, at_most=False,
    ),
    Target(
        "the same with next to no model, binary, over a bare ASGI handler's", "serving",
        served("infera, next to no model", "asgi", "binary", 64), round(1 / 1.2, 3), at_most=False,
    ),
    Target(
        "no less than the bare handler, by the hot path that all of these take", "serving",
        served("infera, next to no model", "asgi", "binary", 64), 1.0, at_most=False, why=_BARE_HOT,
    ),
    *(
        Target(
            f"requests/s with next to no model, {kind}, over a bare ASGI handler's", "serving",
            served("infera, next to no model", "asgi", body, connections), round(1 / 1.2, 3), at_most=False, why=why,
        )
        for kind, body, connections, why in (
            ("JSON, 64 connections", "json", 64, _BARE_JSON), ("binary, 1 connection", "binary", 1, _BARE_ALONE)
        )
    ),
    *(
        Target(
            f"requests/s, JSON, 64 connections, over {name}'s", "serving-peers",
            served("infera", peer, "json", 64, peer_body=body), 8.0, at_most=False, why=why, elsewhere=("serving",),
        )
        for name, peer, body, why in (
            ("MLServer", "mlserver", "json", ""), ("LitServe", "litserve", "rows", ""),
            ("BentoML", "bentoml", "rows", ""), ("FastAPI with onnxruntime", "fastapi", "rows", ""),
            ("TorchServe", "torchserve", "rows", _TORCHSERVE),
        )
    ),
    *(
        Target(
            f"gRPC: processor time with next to no model, over an echo's, {callers} caller{'s' * (callers > 1)}",
            "serving-grpc", called("pick", "aio", callers), 1.2, why=_GRPC,
        )
        for callers in (1, 8, 32)
    ),
    *(
        Target(
            f"answered at ten times the load, of the peak, {where}", "overload",
            overloaded(engine, "goodput"), 0.95, at_most=False, why=_LOCK,
        )
        for where, engine in (
            ("in one process", "server's"), ("`--isolate`", "of its own"), ("`--workers 1`", "worker")
        )
    ),
    Target("p99 of refusals then, ms", "overload", worst("refusal_p99_ms"), 50),
    # At once: who was accepted before is still to be answered, and ten answers in a row are looked at.
    Target("recovers at once: seconds until answers are as before", "overload", worst("recovery_s"), 1.0),
    Target("memory at the end of it, over that after its first second", "overload", grown, 1.1),
)  # fmt: skip
"""In the order in which they are shown."""
