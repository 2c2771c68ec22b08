"""What enters a session's runs: feeds checked against its inputs, converted, and sorted by where they go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np

from infera_gpu.bind import NOWHERE
from infera_gpu.devices import Device
from infera_gpu.errors import InputError
from infera_gpu.feeds import not_feeds, value_of
from infera_gpu.spec import Array, TensorSpec, ValueSpec, bind_symbols, is_plain
from infera_gpu.stages import Shapes

_SHAPE = attrgetter("shape")


@dataclass(slots=True)  # a named tuple takes twice as long to make
class Entering:
    """The feeds of a run: arrays, the shapes of all inputs, and what no arena holds, to which a run adds. `out` are
    arrays for outputs."""

    arrays: dict[str, Array]
    shapes: Shapes
    objects: dict[str, Any]
    out: Mapping[str, Array]


class Entry:
    """The inputs of a session, on its device."""

    def __init__(self, inputs: Mapping[str, ValueSpec], device: Device) -> None:
        self.inputs, self._device = inputs, device
        self._expected = tuple(
            [(n, s, s.dtype if isinstance(s, TensorSpec) and is_plain(s) else None) for n, s in inputs.items()]
        )
        """Of each input its name, its type, and what an array has that is one as it is."""
        self._all_plain = all(map(is_plain, inputs.values()))

    def take(self, feeds: Mapping[str, Any]) -> Entering:
        """The values of all inputs; their shapes are not checked. Raises InputError."""
        if type(feeds) is not dict and not isinstance(feeds, Mapping):
            raise not_feeds(feeds)
        if feeds.keys() != self.inputs.keys():
            self.check_names(feeds)
        values: dict[str, Any] = {}
        for name, spec, dtype in self._expected:
            value = feeds[name]
            if dtype is None:
                values[name] = value_of(name, value, spec, self._device)
            elif type(value) is np.ndarray and value.dtype == dtype:
                values[name] = value  # as it is, whatever the device
            else:
                there = self._device.accepts(value)
                is_one = there is not None and there.dtype == dtype
                values[name] = there if is_one else value_of(name, value, spec, self._device)
        return self.sort(values)

    def sort(self, values: dict[str, Any]) -> Entering:
        """Values of all inputs, in their order."""
        if self._all_plain:
            return Entering(values, tuple(map(_SHAPE, values.values())), {}, NOWHERE)
        plain = {k: v for k, v in values.items() if is_plain(self.inputs[k])}
        return Entering(
            plain,
            tuple(v.shape if isinstance(self.inputs[k], TensorSpec) else () for k, v in values.items()),
            {k: v for k, v in values.items() if k not in plain},
            NOWHERE,
        )

    def check_names(self, given: Mapping[str, Any]) -> None:
        """Raises InputError where an input is missing, or something else is given."""
        if given.keys() == self.inputs.keys():
            return
        expected = ", ".join(f"{k} {s}" for k, s in self.inputs.items()) or "none"
        for name in self.inputs:
            if name not in given:
                others = ", ".join(f"'{k}'" for k in given if k not in self.inputs)
                unknown = f", but {others} given" if others else ""
                raise InputError(f"input '{name}' is missing{unknown}; the model's inputs are: {expected}")
        for name in given:
            if name not in self.inputs:
                raise InputError(f"'{name}' is not an input; the model's inputs are: {expected}")

    def check_shapes(self, shapes: Shapes) -> None:
        """Raises InputError for sizes that are not those declared, or that differ where one symbol stands for them."""
        try:
            bind_symbols(
                (n, s, shape)
                for (n, s), shape in zip(self.inputs.items(), shapes, strict=True)
                if isinstance(s, TensorSpec)
            )
        except ValueError as error:
            raise InputError(f"input {error}") from None
