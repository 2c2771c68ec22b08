"""What a plan takes of a GPU, counted before anything is taken: its steps are bound to nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np

from infera_gpu.bind import BoundBuffers, LazyInputs
from infera_gpu.constants import Constants, Wanted, hollow, pooled
from infera_gpu.devices.base import Device
from infera_gpu.errors import planning
from infera_gpu.graph import Graph, HostArray
from infera_gpu.layout import Operand, Space
from infera_gpu.op import Call, Launcher
from infera_gpu.plan import Plan, Step, unpacked
from infera_gpu.spec import Array


def missing(device: Device, constants: Constants, *plans: Plan, lasting: bool = False) -> int:
    """Bytes of a GPU's memory that constants of these plans still take when they are bound, each aligned; only of
    those that last. Packed forms are made, or were, to see how large they are. No bytes on the host."""
    if device.space != "device":
        return 0
    with constants.making:
        wanted = [_wanted(plan, device, constants) for plan in plans]
        sizes = {key: nbytes for found in wanted for key, nbytes in found.lasting.items() if not constants.has(key)}
        return sum(sizes.values()) + (0 if lasting else sum(found.passing for found in wanted))


def launches(device: Device, constants: Constants, plan: Plan) -> tuple[int, ...]:
    """How many launches each step of a plan for a GPU is, with kernels of ours alone; copies and what runs as a
    function count as one."""
    with constants.making:
        return tuple(_wanted(plan, device, constants).launches)


def least_bytes(graph: Graph) -> int:
    """Bytes of constants that a GPU holds for every plan of the graph, at the least: those of more than one axis that
    are read with values that follow from inputs. Axes, shapes and the like are vectors, or known when planning is done.
    """
    varying = {*graph.inputs, *graph.overridable}
    needed = dict[int, int]()
    for node in graph.nodes:
        if node.op in ("Shape", "Size") or varying.isdisjoint(node.reads):
            continue
        varying.update(node.outputs)
        read = [graph.constants[v] for v in node.inputs if v in graph.constants]
        needed.update((id(a), a.nbytes) for a in read if a.ndim > 1 and a.dtype.name in _KEPT_WHOLE)
    return sum(needed.values())


_KEPT_WHOLE = frozenset({"float64", "float32", "float16", "bfloat16", "int8", "uint8"})
"""Types that no kernel packs into fewer bytes, as indices and numbers of 4 bits may be."""


def _wanted(plan: Plan, device: Device, constants: Constants) -> Wanted:
    found = constants.wanted.get(plan)
    if found is None:
        found = Wanted()
        _count(plan, device, cast(Constants, _Counted(constants, found)), found)
        constants.wanted[plan] = found
    return found


class _Nothing:
    """A launcher that launches nothing, for the GPU of another. It has no libraries, and kernels of ours need no less
    than they do."""

    def __init__(self, launcher: Launcher) -> None:
        from infera_kernels.launch import describes, target_of

        self.target, self.describes = target_of(launcher), describes(launcher)

    def launch(
        self, kernel: Any, grid: tuple[int, ...], args: Mapping[str, Any], constexprs: Mapping[str, Any], **options: Any
    ) -> Call:
        return tuple, ()


class _Dry:
    """A GPU as kernels see it while they are bound, which takes nothing."""

    xp = np
    threads = 1

    def __init__(self, device: Device, wanted: Wanted) -> None:
        self._device, self._wanted = device, wanted
        self.least_ns, self.strict, self.tf32 = device.least_ns, device.strict, device.tf32
        self._launcher: Launcher | None = None

    @property
    def launcher(self) -> Launcher:
        if self._launcher is None:
            self._launcher = _Nothing(self._device.launcher)
        return self._launcher

    def view(self, block: object, operand: Operand) -> HostArray:
        return hollow(operand.shape, operand.dtype, operand.strides, operand.offset)

    def constant(self, host: HostArray, space: Space) -> HostArray:
        self._wanted.passing += pooled(host.nbytes)
        return host

    def parallel(self, parts: Sequence[Iterable[Call]]) -> list[Call]:
        return []


class _Counted:
    """Constants as kernels see them, which are counted and not made."""

    def __init__(self, constants: Constants, wanted: Wanted) -> None:
        self._constants, self._wanted = constants, wanted

    def get(
        self, host: HostArray, space: Space, tag: str = "", build: Callable[[HostArray], HostArray] | None = None
    ) -> HostArray:
        return self._constants.counted(host, tag, build, self._wanted) if space == "device" else host


def _count(plan: Plan, device: Device, constants: Constants, wanted: Wanted) -> None:
    """Binds the plan's steps to nothing; `constants` add to `wanted`, to which launches are added here."""
    dry = cast(Device, _Dry(device, wanted))

    def array(o: Operand) -> Array:
        return constants.get(plan.constants[o.root], o.space) if o.constant else dry.view(None, o)

    def scratch(nbytes: int) -> tuple[None, int]:
        return None, 0

    def bind(step: Step) -> int:
        if not any(o.nbytes for o in step.outs):
            return 0
        if step.kernel is None or step.placed is None:
            for o in step.ins:
                if o is not None and o.constant:
                    array(o)
        elif step.space == "device":
            outs = tuple(map(array, step.outs))
            ins = LazyInputs(step.ins, array)
            io = BoundBuffers(dry, constants, step.placed, ins, outs, "device", scratch)
            calls = list(step.kernel.bind(step.placed.site, io))
            device.wrap(step, calls, ins, outs)
            return len(calls)
        return 1

    with planning() as at:
        for fields in plan.packed:
            step = unpacked(fields, plan.segment.nodes)
            at.what = step.label
            wanted.launches.append(bind(step))
    for o in (*plan.inputs.values(), *plan.outputs.values()):
        if o.constant:
            array(o)
