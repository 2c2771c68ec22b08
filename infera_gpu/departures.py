"""Where two runs of a model part: every value that both make, compared in the order in which it is made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from infera_gpu.devices import Device, open_device
from infera_gpu.devices.cpu import CpuDevice
from infera_gpu.graph import Graph, HostArray, Node, made_name
from infera_gpu.loader import load_graph
from infera_gpu.passes import Precision
from infera_gpu.passes.half import HALF
from infera_gpu.running import optimized
from infera_gpu.session import Session
from infera_gpu.source import Source
from infera_gpu.spec import TensorSpec
from infera_gpu.verify import Difference, difference

TOGETHER = 32
"""Values that are looked at in one run: all of them may take more memory than there is."""


@dataclass(frozen=True, slots=True)
class Departure:
    """A node that runs, and how far one of its outputs is from the same value of the reference."""

    node: Node
    difference: Difference


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

    In the order of execution. Values that passes did away with have nothing to be compared with, sequences are left
    out. Raises as `infera_gpu.load` and `Session.run` do.
    """
    reference = load_graph(model).overriding(feeds)
    opened = open_device(device, threads=threads, tf32=precision == "tf32", batch_invariant=batch_invariant)
    try:
        tested = optimized(reference, opened, precision=precision)
        known = {o for n in reference.nodes for o in n.outputs if o}
        makers = {o: n for n in tested.nodes for o in n.outputs if o and _plain(o) in known}
        every = list(makers)
        for start in range(0, len(every), TOGETHER):
            names = every[start : start + TOGETHER]
            got = _run(tested, names, opened, feeds)
            want = _run(reference, [_plain(n) for n in names], CpuDevice(threads), feeds)
            for name in names:
                base = _plain(name)
                if isinstance(made := got[name], np.ndarray):
                    yield Departure(makers[name], difference(base, made.astype(want[base].dtype), want[base]))
    finally:
        opened.close()


def _plain(name: str) -> str:
    """What the model calls a value that is in half precision now."""
    return name.removesuffix(made_name("", HALF))


def _run(graph: Graph, values: Sequence[str], device: Device, feeds: Mapping[str, HostArray]) -> dict[str, HostArray]:
    """These values of a graph, as it is written."""
    unknown = TensorSpec((), np.dtype(np.float32), ranked=False)
    session = Session(replace(graph, outputs=dict.fromkeys(values, unknown), overridable={}), device, fuse=False)
    with session:
        return session.run(feeds)
