"""From a file to a session."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from numbers import Real
from typing import Literal, SupportsIndex

from infera_gpu.budget import VramBudget
from infera_gpu.cpus import MAX_THREADS
from infera_gpu.devices import open_device
from infera_gpu.dry import least_bytes
from infera_gpu.errors import InputError
from infera_gpu.garbage import settle, uncollected
from infera_gpu.graph_cache import entry_of
from infera_gpu.lease import Arena
from infera_gpu.loader import load_graph
from infera_gpu.ops import registry
from infera_gpu.passes import HALVES, PRECISIONS, Precision
from infera_gpu.passes.gradient import differentiated
from infera_gpu.passes.int8 import WORTH, quantises
from infera_gpu.plan_cache import KeptPlans
from infera_gpu.session import TUNING_SECONDS, Session
from infera_gpu.source import Source
from infera_gpu.spec import TensorSpec
from infera_gpu.supported import check_supported

_log = logging.getLogger(__name__)

registry()  # what most models need is imported with the package


@uncollected()
def load(
    model: Source,
    *,
    device: str = "auto",
    threads: int | None = None,
    fuse: bool = True,
    accuracy: Literal["fast", "strict"] = "fast",
    jit: bool | None = None,
    graphs: bool = True,
    max_concurrency: int = 4,
    arena: Arena | None = None,
    vram_limit: SupportsIndex | str | VramBudget | None = None,
    precision: Precision = "fp32",
    batch_invariant: bool = False,
    mapped: bool = True,
    tune: bool | float = False,
    shapes: Mapping[str, Sequence[int]] | Sequence[Mapping[str, Sequence[int]]] | None = None,
) -> Session:
    """Load an ONNX model: a path, serialised bytes or a ModelProto.

    `device` is "auto" (the first GPU, else the CPU), "cpu", "cuda", "cuda:N" or "recording". `threads` is how many
    threads a run on the CPU has; None is one for every core, or what the environment variable INFERA_THREADS says.
    All but one of them are in worker processes, from a plan's second run on, unless INFERA_PROCESSES is 0. Sessions
    share them, and from the first run until the last session is closed or collected NumPy's BLAS has one thread, in the
    whole process.
    `fuse=False` runs the graph as it is written. `accuracy="strict"` keeps to the order of operations that the model
    writes, as far as BLAS does: nothing is folded into weights, no norm, softmax, attention or activation that is
    spelled out is computed by another formula, convolutions take no Winograd, and nothing that numba compiles
    runs. `jit` says whether the CPU runs such kernels; None does where numba is installed. On a GPU all steps that can
    be are captured into CUDA graphs; `graphs=False` launches them one by one. Up to `max_concurrency` runs go on at
    once, each in an arena of its own; with `arena`, as many as that allows, over all sessions that share it.
    `vram_limit` is the most memory of a GPU that the session takes ("4GiB", or bytes), or a VramBudget, which several
    sessions have together; the CPU has none. A model whose weights do not fit is refused here, a plan that does not fit
    beside them when it is made.

    `shapes` are those that inputs will have, by name: of the one run that there is, or a list, one of each. They are
    planned here, weights are uploaded, and the arena is as large as the largest of them needs, for good: a run that
    needs more is an OutOfMemoryError. Without them the arena grows with the largest run so far; on a GPU a model whose
    shapes are fixed is planned here all the same.

    `precision` is in what float32 models are computed. "fp32" is float32 throughout. "tf32" lets products and
    convolutions round their operands to 10 bits on tensor cores. "fp16" and "bf16" compute in half precision what gains
    by it, with sums, norms and softmax in float32, "int8" products with known weights on integers whose scales are
    found in every run; inputs and outputs keep their types. `infera verify --precision` shows what it costs a model. On
    the CPU the last three are slow, there to check results; "tf32" changes nothing there.

    With `batch_invariant` what a GPU makes of one entry of a batch is the same bits whatever else is in the batch, and
    however large it is; a node that cannot promise it is a PlanError when it is planned, the CPU a DeviceError here.
    docs/gpu.md says what it takes to mean "entry", and what it costs.

    What passes make of a small model in a file is kept on disk the second time that it is loaded, for the third and all
    later times: `graph_cache`. On the CPU so are its plans, as they are made from then on, and how they were bound:
    `plan_cache`.

    External data is mapped, so that processes share it and what is never needed is never read: its files must stay as
    they are while the session lives. `mapped=False` reads them, and they may change.

    `tune` measures tiles of kernels on the GPU in the first runs, up to so many seconds in all (`True` is 60), as
    `Session.tune` does; what was measured before is used in any case.

    Raises InvalidModel (not a model, damaged), UnsupportedOperatorError (all of them listed), DeviceError,
    OutOfMemoryError, and of shapes that are planned here InputError or PlanError.
    """
    _require_flags(fuse=fuse, graphs=graphs, batch_invariant=batch_invariant, mapped=mapped)
    if jit is not None:
        _require_flags(jit=jit)
    if not isinstance(tune, Real) or not tune >= 0:  # nan neither
        raise InputError(f"tune is {tune!r}, expected True, False, or a number of seconds as 60")
    if accuracy not in ("fast", "strict"):
        raise InputError(f"accuracy is {accuracy!r}, expected 'fast' or 'strict'")
    if arena is not None and not isinstance(arena, Arena):
        raise InputError(f"arena is a {type(arena).__name__}, expected an infera_gpu.Arena")
    if precision not in PRECISIONS:
        raise InputError(f"precision is {precision!r}, expected one of {', '.join(PRECISIONS)}")
    if precision not in ("fp32", "tf32") and not fuse:
        raise InputError(f"precision='{precision}' rewrites the graph, fuse=False runs it as it is written")
    if threads is not None and (type(threads) is not int or not 1 <= threads <= MAX_THREADS):
        raise InputError(f"threads is {threads!r}, expected a positive number up to {MAX_THREADS}")
    expected = [shapes] if isinstance(shapes, Mapping) else list(shapes or ())
    if expected and tune:
        raise InputError("tune measures in the first runs, shapes are planned before them: call Session.tune instead")
    budget = vram_limit if vram_limit is None or isinstance(vram_limit, VramBudget) else VramBudget(vram_limit)
    opened = open_device(
        device,
        threads=threads,
        strict=accuracy == "strict",
        jit=jit,
        captures=graphs,
        tf32=precision == "tf32",
        batch_invariant=batch_invariant,
        budget=budget,
    )
    if device == "auto" and opened.space == "host" and precision in HALVES:
        _log.warning("there is no GPU: precision='%s' is computed on the CPU, slower than in fp32", precision)
    again = partial(load_graph, os.path.abspath(model), mapped) if isinstance(model, str | os.PathLike) else None
    try:
        began = time.thread_time()
        entry = entry_of(model, opened, precision) if fuse else None
        optimised = entry.read() if entry is not None else None
        if (graph := optimised) is None:
            graph = differentiated(load_graph(model, mapped, opened.room))
            check_supported(graph, registry())
            if precision == "int8" and not quantises(graph):
                _log.warning(
                    "'%s': precision='int8' changes nothing: no float32 product has known weights of %s elements or "
                    "more; convolutions, and what loops and branches compute, stay float32",
                    graph.name,
                    f"{WORTH:,}",
                )
                entry = None  # a graph that is kept would not warn
        session = Session(
            graph,
            opened,
            fuse=fuse,
            arena=arena or Arena(max_concurrency),
            again=again,
            precision=precision,
            optimised=optimised is not None,
        )
        kept = optimised is not None
        if entry is not None and not kept and not graph.overridable:
            kept = entry.keep(session.graph, time.thread_time() - began)
        if kept and entry is not None and entry.path is not None and opened.space == "host":
            session.keep_plans(KeptPlans(entry.path, session.graph, opened, registry()))
        opened.require(f"to load the weights of '{session.name}'", least_bytes(session.graph))
        if tune:
            session.tunable()
            with opened.running():
                opened.timer()  # or the first run would find that there is none
            session.tuning_left = TUNING_SECONDS if tune is True else float(tune)
        elif expected:
            session.reserve(*expected, final=True)
        elif opened.space == "device" and (fixed := _fixed(session)) is not None:
            session.reserve(fixed)
        settle("load")
        return session
    except BaseException:
        opened.close()
        raise


def _require_flags(**given: object) -> None:
    """Raises InputError for what is neither True nor False: "no" would be taken as true."""
    for name, value in given.items():
        if not isinstance(value, bool):
            raise InputError(f"{name} is {value!r}, expected True or False")


def _fixed(session: Session) -> dict[str, tuple[int, ...]] | None:
    """The only shapes that the inputs can have, where that is so."""
    specs = session.inputs
    fixed = {k: s.dims for k, s in specs.items() if isinstance(s, TensorSpec) and s.is_static and s.dtype != object}
    return fixed if len(fixed) == len(specs) else None
