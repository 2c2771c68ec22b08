"""How arrays get into a bound plan and out of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from infera_gpu.memory import aligned
from infera_gpu.op import Call
from infera_gpu.spec import Array

TOGETHER = 1 << 16
"""Bytes. Up to that, copies wait their turn among the kernels: events between streams would take longer than they."""


class Ports(Protocol):
    """The inputs and outputs of one bound plan, by name."""

    def fill(self, entering: Mapping[str, Array]) -> None:
        """Copies every input to its place. What runs on the device after it sees them."""
        ...

    def read(self, targets: Mapping[str, Array]) -> None:
        """Copies outputs to arrays of the caller's. When it returns they are there, and the plan's steps are done."""
        ...


class Copier(Protocol):
    """What copying directly takes of a device."""

    xp: Any

    def transfer(self, source: Array, target: Array) -> Call: ...

    def synchronize(self) -> None: ...


class DirectPorts:
    """Copies from and to the caller's arrays, one after the other."""

    def __init__(self, device: Copier, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        self._device, self._inputs, self._outputs = device, inputs, outputs

    def fill(self, entering: Mapping[str, Array]) -> None:
        for name, target in self._inputs.items():
            copy, args = self._device.transfer(entering[name], target)
            copy(*args)

    def read(self, targets: Mapping[str, Array]) -> None:
        for name, target in targets.items():
            copy, args = self._device.transfer(self._outputs[name], target)
            copy(*args)
        self._device.synchronize()


class HostPorts:
    """Copies within host memory."""

    def __init__(self, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        self._inputs, self._outputs = tuple(inputs.items()), outputs

    def fill(self, entering: Mapping[str, Array]) -> None:
        for name, target in self._inputs:
            target[...] = entering[name]  # np.copyto does the same, and takes three times as long for a few elements

    def read(self, targets: Mapping[str, Array]) -> None:
        for name, target in targets.items():
            target[...] = self._outputs[name]


class Streams:
    """A GPU's streams: `compute` for the steps, and one a direction for copies of host memory."""

    def __init__(self, cupy: Any) -> None:
        self.compute, self.entry, self.exit = (cupy.cuda.Stream(non_blocking=True) for _ in range(3))

    def synchronize(self) -> None:
        for stream in (self.entry, self.compute, self.exit):
            stream.synchronize()


class StagedPorts:
    """Copies through page-locked memory, on streams of their own: while one run computes, another's arrays travel.

    `staging` is a block of page-locked memory, of as much as the plan says. One run at a time uses it: when a run
    begins, nothing that an earlier one copied is on its way any more. Arrays that the caller has on the GPU are copied
    there, among the kernels. Outputs of steps on the host are copied when the steps are done.
    """

    def __init__(
        self,
        device: Copier,
        streams: Streams,
        inputs: Mapping[str, Array],
        outputs: Mapping[str, Array],
        staging: Any,
    ) -> None:
        self._device, self._cupy, self._streams = device, device.xp, streams
        at = 0

        def staged(array: Array) -> Any:
            nonlocal at
            window = np.ndarray(array.shape, array.dtype, staging, at)
            at += aligned(array.nbytes)
            return window

        self._inputs = {k: (a, staged(a)) for k, a in inputs.items()}
        self._on_host = {k: a for k, a in outputs.items() if not isinstance(a, self._cupy.ndarray)}
        self._outputs = {k: (a, staged(a), self._event()) for k, a in outputs.items() if k not in self._on_host}
        self._dense = {k: (a.data, a.nbytes) for k, (a, *_) in self._outputs.items() if a.flags.c_contiguous}
        self._entry = self._stream(inputs, streams.entry)
        self._exit = self._stream(outputs, streams.exit)
        self._entered, self._computed = self._event(), self._event()

    def _event(self) -> Any:
        return self._cupy.cuda.Event(disable_timing=True)

    def _stream(self, arrays: Mapping[str, Array], own: Any) -> Any:
        return own if sum(a.nbytes for a in arrays.values()) > TOGETHER else self._streams.compute

    def fill(self, entering: Mapping[str, Array]) -> None:
        compute = self._streams.compute
        travelling = False
        for name, (target, window) in self._inputs.items():
            source = entering[name]
            if isinstance(source, self._cupy.ndarray):
                self._cupy.copyto(target, source)
            elif target.nbytes:
                np.copyto(window, source)
                target.set(window, self._entry)
                travelling = True
        if travelling and self._entry is not compute:
            compute.wait_event(self._entry.record(self._entered))

    def read(self, targets: Mapping[str, Array]) -> None:
        compute, leaving = self._streams.compute, self._exit
        away = {}
        for name, target in targets.items():
            if name in self._on_host or not target.nbytes:
                continue
            if not isinstance(target, self._cupy.ndarray):
                away[name] = target
            elif name in self._dense and target.flags.c_contiguous:
                target.data.copy_from_device_async(*self._dense[name], compute)
            else:
                self._cupy.copyto(target, self._outputs[name][0])
        computed = compute.record(self._computed)
        if leaving is not compute:
            leaving.wait_event(computed)
        for name in away:
            source, window, there = self._outputs[name]
            source.get(leaving, out=window, blocking=False)
            leaving.record(there)
        for name, target in away.items():
            _, window, there = self._outputs[name]
            there.synchronize()
            np.copyto(target, window)
        if not away:
            computed.synchronize()
        if self._on_host:
            DirectPorts(self._device, {}, self._on_host).read({k: v for k, v in targets.items() if k in self._on_host})
