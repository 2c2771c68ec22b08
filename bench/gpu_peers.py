"""What rows of the GPU benchmarks are timed against: PyTorch, where it is installed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeAlias, TypeVar

from bench.gpu_report import first_line, loses_the_gpu
from bench.gpu_timings import Contender, flushing_shape
from infera_gpu.graph import HostArray
from infera_gpu.passes import Precision
from infera_gpu.source import Source

T = TypeVar("T")
Feeds: TypeAlias = Mapping[str, HostArray]
Tensors: TypeAlias = Sequence[Any]
Peer: TypeAlias = Callable[[Any, Source, Tensors], Callable[[], Any]]
"""Makes of torch, the model and its inputs on the GPU the call that computes the first output in torch: of a network a
partial of its module."""

MODES = {"max-autotune": "max-autotune-no-cudagraphs", "reduce-overhead": "default"}
"""What torch.compile is asked for: graphs of its own are bound to its own stream, ours are replayed where all are."""

REPEATED = 20
"""How often a graph holds a short row, so that the host does not show."""


@dataclass
class Beside:
    """Peers of a row: what is timed, by name, also with a flushed L2 cache; the first output of the first one that
    answers, in float32; and what failed, which is no failure of ours."""

    hot: dict[str, Contender] = field(default_factory=dict)
    cold: dict[str, Contender] = field(default_factory=dict)
    want: HostArray | None = None
    failed: dict[str, str] = field(default_factory=dict)

    def attempt(self, name: str, make: Callable[[], T]) -> T | None:
        """What is made; None where that fails, which is noted. Raises what loses the GPU."""
        try:
            return make()
        except Exception as error:
            if loses_the_gpu(error):
                raise
            self.failed[name] = first_line(error)
            return None


def torch_on_gpu() -> Any:
    """torch; None where it is not installed or has no GPU."""
    if find_spec("torch") is None:
        return None
    torch = import_module("torch")
    return torch if torch.cuda.is_available() else None


def torch_type(torch: Any, precision: Precision) -> Any:
    """What torch's tensors are of at a precision."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)


def compiled(torch: Any, function: Callable[..., Any], mode: str = "default") -> Callable[..., Any]:
    """The function by torch.compile, for one shape. What was compiled before is forgotten: after eight shapes of one
    function it would not be compiled at all."""
    torch._dynamo.reset()
    made: Callable[..., Any] = torch.compile(function, mode=mode, dynamic=False)
    return made


def captured(torch: Any, calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """A CUDA graph of the calls, which have run before and been replayed."""
    with torch.inference_mode():
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                for call in dict.fromkeys(calls):
                    call()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=side):
                for call in calls:
                    call()
            graph.replay()
            torch.cuda.synchronize()
    replay: Callable[[], object] = graph.replay
    return replay


def contenders(
    torch: Any,
    peers: Mapping[str, Peer],
    source: Source,
    feeds: Feeds,
    precision: Precision,
    *,
    network: bool = False,
    compile_mode: str = "",
    flushed: int = 0,
) -> Beside:
    """An operator is replayed from a graph, and where `flushed` bytes are given, from one in which as many are read
    before each call. A network runs eagerly, from a graph, and compiled where `compile_mode` asks for it."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.benchmark = True
    made = Beside()
    for name, peer in peers.items():
        answered = made.attempt(name, partial(_answered, torch, peer, source, feeds, precision))
        if answered is None:
            continue
        call, first = answered
        made.want = first if made.want is None else made.want
        attempts: dict[str, Callable[[], Contender]] = {}
        if network:
            made.hot[f"{name} eager"] = Contender(call)
            attempts[f"{name} eager, CUDA graph"] = partial(_repeated, torch, call, 1)
            if compile_mode:
                attempts[f"{name}.compile {compile_mode}"] = partial(_compiled, torch, call, MODES[compile_mode])
        else:
            attempts[name] = partial(_repeated, torch, call, REPEATED)
        for what, make in attempts.items():
            if (contender := made.attempt(what, make)) is not None:
                made.hot[what] = contender
        if flushed and name in made.hot:
            cold = made.attempt(f"{name}, L2 flushed", partial(_flushed, torch, call, flushed))
            made.cold |= {} if cold is None else {name: cold}
    return made


def _answered(
    torch: Any, peer: Peer, source: Source, feeds: Feeds, precision: Precision
) -> tuple[Callable[[], Any], HostArray]:
    """The peer's call, on inputs of its own, and its first output."""
    given = [torch.tensor(v, device="cuda") for v in feeds.values()]
    given = [t.to(torch_type(torch, precision)) if t.is_floating_point() else t for t in given]
    with torch.inference_mode():
        call = peer(torch, source, given)
        first = call()
    return call, (first[0] if isinstance(first, tuple) else first).float().cpu().numpy()


def _repeated(torch: Any, call: Callable[[], Any], times: int) -> Contender:
    return Contender(captured(torch, [call] * times), times)


def _compiled(torch: Any, call: Callable[[], Any], mode: str) -> Contender:
    assert isinstance(call, partial)
    return _repeated(torch, partial(compiled(torch, call.func, mode), *call.args), 1)


def _flushed(torch: Any, call: Callable[[], Any], nbytes: int) -> Contender:
    read = torch.empty(flushing_shape(nbytes), dtype=torch.float32, device="cuda")
    flush = partial(torch.amax, read, 1, out=torch.empty(read.shape[:1], dtype=torch.float32, device="cuda"))
    return Contender(captured(torch, [flush, call] * REPEATED), REPEATED, captured(torch, [flush] * REPEATED))
