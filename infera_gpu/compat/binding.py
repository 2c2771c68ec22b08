"""onnxruntime.IOBinding: inputs and outputs that stay where they are from one run to the next."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from infera_gpu.compat.ortvalue import OrtValue, host_array, open_place
from infera_gpu.devices import Device
from infera_gpu.errors import InputError
from infera_gpu.graph import HostArray
from infera_gpu.session import Session
from infera_gpu.spec import Array

if TYPE_CHECKING:
    from infera_gpu.compat.inference import InferenceSession


def check_name(name: str, known: Iterable[str], what: str) -> str:
    """`name`. Raises InputError where it is not among `known`."""
    if name not in known:
        raise InputError(f"'{name}' is not an {what}; the {what}s are: {', '.join(known)}")
    return name


class _Fixed(NamedTuple):
    """A run whose arrays are all bound: the same in every run, until something else is bound."""

    feeds: Mapping[str, Array]
    out: Mapping[str, Array]
    results: Sequence[OrtValue]


class IOBinding:
    """The inputs and outputs of runs of one session. Made by InferenceSession.io_binding().

    A name that the model does not have raises InputError when it is bound. Outputs are those bound, in that order. An
    output bound to a device without memory is new memory in every run.
    """

    def __init__(self, session: InferenceSession) -> None:
        self.session: Session = session.session
        self._inputs: dict[str, OrtValue] = {}
        self._outputs: dict[str, OrtValue | Device] = {}
        self._results: Sequence[OrtValue] = ()
        self._fixed: _Fixed | None = None

    def bind_cpu_input(self, name: str, arr_on_cpu: HostArray) -> None:
        """Every run reads the array anew, where it is contiguous; otherwise the copy that is taken now."""
        host = host_array(arr_on_cpu, f"input '{name}'")
        self.bind_ortvalue_input(name, OrtValue.placed(host, open_place("cpu", 0, self.session.device)))

    def bind_input(
        self, name: str, device_type: str, device_id: int, element_type: Any, shape: Sequence[int], buffer_ptr: int
    ) -> None:
        """Every run reads `buffer_ptr`, C-contiguous memory that the caller keeps alive."""
        place = open_place(device_type, device_id, self.session.device)
        self.bind_ortvalue_input(name, OrtValue.at_address(buffer_ptr, shape, element_type, place))

    def bind_ortvalue_input(self, name: str, ortvalue: OrtValue) -> None:
        self._inputs[check_name(name, self.session.inputs, "input")] = ortvalue
        self._fixed = None

    def bind_output(
        self,
        name: str,
        device_type: str = "cpu",
        device_id: int = 0,
        element_type: Any = None,
        shape: Sequence[int] | None = None,
        buffer_ptr: int | None = None,
    ) -> None:
        """With `buffer_ptr`, every run writes that memory, which the caller keeps alive; else memory of its own.

        Raises InputError where `buffer_ptr` comes without `element_type` and `shape`.
        """
        place = open_place(device_type, device_id, self.session.device)
        bound: OrtValue | Device = place
        if buffer_ptr is not None:
            if element_type is None or shape is None:
                raise InputError(f"output '{name}': buffer_ptr needs element_type and shape")
            bound = OrtValue.at_address(buffer_ptr, shape, element_type, place)
        self._bind_output(name, bound)

    def bind_ortvalue_output(self, name: str, ortvalue: OrtValue) -> None:
        self._bind_output(name, ortvalue)

    def _bind_output(self, name: str, bound: OrtValue | Device) -> None:
        self._outputs[check_name(name, self.session.outputs, "output")] = bound
        self._fixed = None

    def synchronize_inputs(self) -> None:
        """Nothing to wait for: a run orders itself behind what the caller's current stream holds."""

    def synchronize_outputs(self) -> None:
        """Nothing to wait for: outputs are complete when a run returns."""

    def get_outputs(self) -> list[OrtValue]:
        """The outputs of the last run, in the order in which they were bound; none before the first."""
        return list(self._results)

    def copy_outputs_to_cpu(self) -> list[HostArray]:
        """Copies of the outputs of the last run in host memory."""
        return [value.copy() for value in self._results]

    def clear_binding_inputs(self) -> None:
        self._inputs.clear()
        self._fixed = None

    def clear_binding_outputs(self) -> None:
        self._outputs.clear()
        self._results, self._fixed = (), None

    def execute(self) -> None:
        """Run the session once: what InferenceSession.run_with_iobinding does. Raises InputError without an output."""
        if (fixed := self._fixed) is not None:
            self.session.run(fixed.feeds, fixed.out)
            self._results = fixed.results
            return
        if not self._outputs:
            raise InputError("no output is bound; bind at least one with bind_output")
        here = self.session.device
        feeds = {name: value.readable_on(here) for name, value in self._inputs.items()}
        memory = self._memory(feeds)
        direct = {name: v.array for name, v in memory.items() if v.device.name in ("cpu", here.name)}
        results = self.session.run(feeds, out=direct)
        for name, value in memory.items():
            if name not in direct:
                value.update_inplace(results[name])
        self._results = [
            memory.get(name) or OrtValue.placed(np.ascontiguousarray(results[name]), self._place(name))
            for name in self._outputs
        ]
        if direct.keys() == self._outputs.keys() and self._bound_alone(feeds):
            self._fixed = _Fixed(feeds, direct, self._results)

    def _bound_alone(self, feeds: Mapping[str, Array]) -> bool:
        """Whether a run makes no array of its own."""
        inputs, outputs = self._inputs.items(), self._outputs.values()
        return all(v.array is feeds[name] for name, v in inputs) and all(isinstance(v, OrtValue) for v in outputs)

    def _place(self, name: str) -> Device:
        bound = self._outputs[name]
        return bound.device if isinstance(bound, OrtValue) else bound

    def _memory(self, feeds: Mapping[str, Array]) -> dict[str, OrtValue]:
        """Memory for the outputs that have theirs, and for those that stay on the GPU where their shape is known.

        A shape that depends on data is known after the run alone; such an output goes through host memory.
        """
        memory = {name: bound for name, bound in self._outputs.items() if isinstance(bound, OrtValue)}
        missing = [name for name in self._outputs if name not in memory and self._place(name).space == "device"]
        if missing:
            plan = self.session.plan_for(feeds)
            for name in missing:
                if plan.segment.is_last and (operand := plan.outputs.get(name)) is not None:
                    memory[name] = OrtValue.empty(tuple(operand.shape), operand.dtype, self._place(name))
        return memory
