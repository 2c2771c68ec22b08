"""What rows of the GPU benchmarks are timed against: PyTorch, where it is installed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeAlias

from infera_gpu.graph import HostArray
from infera_gpu.passes import Precision
from infera_gpu.source import Source

Feeds: TypeAlias = Mapping[str, HostArray]
Tensors: TypeAlias = Sequence[Any]
Peer: TypeAlias = Callable[[Any, Source, Tensors], Callable[[], Any]]
"""Makes of torch, the model and its inputs on the GPU the call that computes the first output in torch: of a network a
partial of its module."""

COMPILED = {"max-autotune": "max-autotune-no-cudagraphs", "reduce-overhead": "default"}
"""What torch.compile is asked for: graphs of its own are bound to its own stream, ours are replayed where all are."""

REPEATED = 20
"""How often a graph holds a short row, so that the host does not show."""


@dataclass(frozen=True)
class Contender:
    """A call, and how often it does the work."""

    call: Callable[[], object]
    times: int = 1


def torch_on_gpu() -> Any:
    """torch; None where it is not installed or has no GPU."""
    if find_spec("torch") is None:
        return None
    torch = import_module("torch")
    return torch if torch.cuda.is_available() else None


def torch_type(torch: Any, precision: Precision) -> Any:
    """What torch's tensors are of at a precision."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)


def captured(torch: Any, call: Callable[[], object], times: int) -> Contender:
    """The call so many times in a CUDA graph, after it has run."""
    with torch.inference_mode():
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            for _ in range(times):
                call()
        torch.cuda.synchronize()
    return Contender(graph.replay, times)


def contenders(
    torch: Any, peer: Peer, source: Source, feeds: Feeds, precision: Precision, *, network: bool, compile_mode: str
) -> tuple[dict[str, Contender], HostArray, str]:
    """By name what is timed, the first output in float32, and why nothing was compiled where that failed.

    An operator is replayed from a graph; a network runs eagerly, and compiled where `compile_mode` asks for it.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    given = [torch.tensor(v, device="cuda") for v in feeds.values()]
    given = [t.to(torch_type(torch, precision)) if t.is_floating_point() else t for t in given]
    with torch.inference_mode():
        call = peer(torch, source, given)
        first = call()
        want = (first[0] if isinstance(first, tuple) else first).float().cpu().numpy()
    if not network:
        return {"torch": captured(torch, call, REPEATED)}, want, ""
    found, failure = {"torch eager": Contender(call)}, ""
    if compile_mode:
        try:
            assert isinstance(call, partial)
            compiled = torch.compile(call.func, mode=COMPILED[compile_mode], dynamic=False)
            found[f"torch.compile {compile_mode}"] = captured(torch, partial(compiled, *call.args), 1)
        except Exception as error:  # whatever the compiler meets on this machine is no failure of ours
            failure = f"{type(error).__name__}: {error}"[:300]
    return found, want, failure
