"""Where two runs of a model part: every value that both make, compared in the order in which it is made."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from infera_gpu.devices import Device, open_device
from infera_gpu.devices.cpu import CpuDevice
from infera_gpu.graph import JOINT, Graph, HostArray, Node, made_name
from infera_gpu.loader import load_graph
from infera_gpu.passes import Precision
from infera_gpu.passes.half import HALF
from infera_gpu.passes.permute import Order, inverse, named_order
from infera_gpu.running import optimized
from infera_gpu.session import Session
from infera_gpu.source import Source
from infera_gpu.spec import TensorSpec
from infera_gpu.verify import Difference, difference

TOGETHER = 32
"""Values that are looked at in one run: all of them may take more memory than there is."""


@dataclass(frozen=True, slots=True)
class Departure:
    """A node that runs, and how far one of its outputs is from the same value of the reference.

    The output is number `at`, from 0 on, of the `made` values that nodes make, inputs in another form left out; what
    lies between the numbers of two departures could not be compared.
    """

    node: Node
    difference: Difference
    at: int
    made: int


class _Counterpart(NamedTuple):
    """The reference's value that one is to equal, whose axes are in this order, if any."""

    value: str
    order: Order = ()

    def restored(self, made: HostArray, like: HostArray) -> HostArray:
        """What was made as the reference has it: its axes in place, without those that came before, and in its type."""
        plain = made.transpose(inverse(self.order)) if len(self.order) == made.ndim else made
        more = plain.ndim - like.ndim
        if more > 0 and plain.shape[:more] == (1,) * more:
            plain = plain.reshape(plain.shape[more:])
        return plain.astype(like.dtype)


def departures(
    model: Source,
    feeds: Mapping[str, HostArray],
    *,
    device: str = "auto",
    threads: int | None = None,
    precision: Precision = "fp32",
    batch_invariant: bool = False,
) -> Iterator[Departure]:
    """Every value of the model that `device` makes at `precision`, against the CPU's in float32 without fusions.

    In the order of execution. Values whose axes are in another order are put back. Those that the model does not have
    have nothing to be compared with, sequences are left out. Raises as `infera_gpu.load` and `Session.run` do.
    """
    reference = load_graph(model).overriding(feeds)
    opened = open_device(device, threads=threads, tf32=precision == "tf32", batch_invariant=batch_invariant)
    try:
        tested = optimized(reference, opened, precision=precision)
        known = {o for n in reference.nodes for o in n.outputs if o}
        makers = [(o, n) for n in tested.nodes for o in n.outputs if o and not _is_input(o, reference)]
        every = [(i, c) for i, (o, _) in enumerate(makers) if (c := _counterpart(o, known)) is not None]
        for start in range(0, len(every), TOGETHER):
            part = every[start : start + TOGETHER]
            got = _run(tested, [makers[i][0] for i, _ in part], opened, feeds)
            want = _run(reference, [c.value for _, c in part], CpuDevice(threads), feeds)
            for i, counterpart in part:
                name, node = makers[i]
                if isinstance(made := got[name], np.ndarray):
                    like = want[counterpart.value]
                    found = difference(counterpart.value, counterpart.restored(made, like), like)
                    yield Departure(node, found, i, len(makers))
    finally:
        opened.close()


def _is_input(name: str, graph: Graph) -> bool:
    """Whether it is one in half precision, say, or with its axes in another order."""
    return name.partition(JOINT)[0] in graph.inputs


def _counterpart(name: str, known: Container[str]) -> _Counterpart | None:
    """Which of the `known` values one is that may be in half precision, with its axes in another order."""
    stored, order = named_order(name) or (name, ())
    for value, axes in ((name, ()), (stored, order)):
        if (plain := value.removesuffix(made_name("", HALF))) in known:
            return _Counterpart(plain, axes)
    return None


def _run(graph: Graph, values: Sequence[str], device: Device, feeds: Mapping[str, HostArray]) -> dict[str, HostArray]:
    """These values of a graph, as it is written."""
    unknown = TensorSpec((), np.dtype(np.float32), ranked=False)
    session = Session(replace(graph, outputs=dict.fromkeys(values, unknown), overridable={}), device, fuse=False)
    with session:
        return session.run(feeds)
