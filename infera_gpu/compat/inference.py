"""onnxruntime.InferenceSession over infera_gpu.Session."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from infera_gpu.compat.binding import IOBinding, check_name
from infera_gpu.compat.options import GraphOptimizationLevel, RunOptions, SessionOptions, check_run_options
from infera_gpu.compat.ortvalue import OrtValue, open_place
from infera_gpu.compat.providers import CPU, CUDA, Provider, device_of
from infera_gpu.compat.types import ModelMetadata, NodeArg
from infera_gpu.devices import open_device
from infera_gpu.errors import InputError
from infera_gpu.opening import load
from infera_gpu.session import Session
from infera_gpu.source import Source, read_metadata
from infera_gpu.spec import Array, OptionalSpec, TensorSpec, ValueSpec


def _sized(session: Session, sizes: Mapping[str, int]) -> Session:
    """The session with symbols replaced by sizes."""

    def sized(specs: Mapping[str, ValueSpec]) -> dict[str, ValueSpec]:
        return {
            name: replace(spec, shape=tuple(sizes.get(d, d) if isinstance(d, str) else d for d in spec.shape))
            if isinstance(spec, TensorSpec)
            else spec
            for name, spec in specs.items()
        }

    graph = session.loaded
    graph = replace(
        graph,
        inputs=sized(graph.inputs),
        outputs=sized(graph.outputs),
        specs=sized(graph.specs),
        overridable=sized(graph.overridable),
    )
    return Session(graph, session.device, fuse=session.fuse)


class InferenceSession:
    """onnxruntime.InferenceSession; `session` is the infera_gpu.Session that does the work.

    Takes a ModelProto as well. `enable_fallback` and `disabled_optimizers` are accepted without effect. Providers that
    do not work here are passed over with a UserWarning, and so is what the options ask for that is not done. Raises
    infera_gpu's own errors, InferaError and below.
    """

    def __init__(
        self,
        path_or_bytes: Source,
        sess_options: SessionOptions | None = None,
        providers: Sequence[Provider] | None = None,
        provider_options: Sequence[Mapping[str, Any]] | None = None,
        *,
        enable_fallback: bool = True,
        disabled_optimizers: Sequence[str] | None = None,
    ) -> None:
        options = SessionOptions() if sess_options is None else sess_options
        if not isinstance(options, SessionOptions):
            raise TypeError(f"sess_options is {type(options).__name__}, expected infera_gpu.SessionOptions")
        device, passed_over = device_of(providers, provider_options)
        for text in (*passed_over, *options.unwritten()):
            warnings.warn(text, UserWarning, stacklevel=2)
        self._options = options
        self._source = path_or_bytes
        self._metadata: ModelMetadata | None = None
        session = load(
            path_or_bytes,
            device=device,
            threads=options.intra_op_num_threads or None,
            fuse=options.graph_optimization_level > GraphOptimizationLevel.ORT_DISABLE_ALL,
        )
        self.session = _sized(session, options.free_dimensions) if options.free_dimensions else session

    # ---- running

    def run(
        self, output_names: Sequence[str] | None, input_feed: Mapping[str, Any], run_options: RunOptions | None = None
    ) -> list[Array]:
        """The outputs named, in that order; all of them for None or an empty list.

        Feeds are arrays, OrtValues, or lists and numbers, which become arrays of the input's type. Raises InputError
        for a name that is no output, and for feeds that do not fit.
        """
        check_run_options(run_options)
        names = self._names(output_names)
        feeds = {name: self._feed(name, input_feed[name]) for name in input_feed.keys()}  # noqa: SIM118
        results = self.session.run(feeds)
        return [results[name] for name in names]

    def run_with_ort_values(
        self,
        output_names: Sequence[str] | None,
        input_dict_ort_values: Mapping[str, OrtValue],
        run_options: RunOptions | None = None,
    ) -> list[OrtValue]:
        """`run`, with OrtValues in host memory for results."""
        host = open_place("cpu", 0, self.session.device)
        return [OrtValue(a, host) for a in self.run(output_names, input_dict_ort_values, run_options)]

    def io_binding(self) -> IOBinding:
        return IOBinding(self)

    def run_with_iobinding(self, iobinding: IOBinding, run_options: RunOptions | None = None) -> None:
        """Run with what is bound. Raises InputError for a binding that another session made."""
        check_run_options(run_options)
        if iobinding.session is not self.session:
            raise InputError("the binding belongs to another session, or to this one before set_providers")
        iobinding.execute()

    def _names(self, given: Sequence[str] | None) -> list[str]:
        if isinstance(given, str):
            raise TypeError(f"output_names is '{given}', expected a list of names")
        return [check_name(name, self.session.outputs, "output") for name in given or self.session.outputs]

    def _feed(self, name: str, value: Any) -> Any:
        if value is None and not isinstance(self.session.inputs.get(name), OptionalSpec):
            raise InputError(f"input '{name}' is None")
        return value.readable_on(self.session.device) if isinstance(value, OrtValue) else value

    # ---- what it is

    def get_inputs(self) -> list[NodeArg]:
        return [NodeArg.of(k, s) for k, s in self.session.inputs.items()]

    def get_outputs(self) -> list[NodeArg]:
        return [NodeArg.of(k, s) for k, s in self.session.outputs.items()]

    def get_overridable_initializers(self) -> list[NodeArg]:
        return [NodeArg.of(k, s) for k, s in self.session.overridable.items()]

    def get_modelmeta(self) -> ModelMetadata:
        """What the model says about itself, read again from where it came."""
        if self._metadata is None:
            self._metadata = ModelMetadata(**read_metadata(self._source))
        return self._metadata

    def get_session_options(self) -> SessionOptions:
        return self._options

    # ---- providers

    def get_providers(self) -> list[str]:
        return list(self.get_provider_options())

    def get_provider_options(self) -> dict[str, dict[str, str]]:
        """The providers in use and the options of each that have an effect."""
        kind, _, index = self.session.device.name.partition(":")
        return {CPU: {}} if kind == "cpu" else {CUDA: {"device_id": index}, CPU: {}}

    def set_providers(
        self,
        providers: Sequence[Provider] | None = None,
        provider_options: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        """Move to the first of these providers that works. Bindings made before belong to the former session."""
        device, passed_over = device_of(providers, provider_options)
        for text in passed_over:
            warnings.warn(text, UserWarning, stacklevel=2)
        self.session = Session(self.session.loaded, open_device(device), fuse=self.session.fuse)

    def enable_fallback(self) -> None:
        """No effect: a provider that fails during a run raises DeviceError."""

    def disable_fallback(self) -> None:
        """No effect: there is no fallback during a run."""

    # ---- profiling

    def end_profiling(self) -> str:
        """An empty string: no profile is written. `session.profile(feeds)` times every step."""
        return ""

    def get_profiling_start_time_ns(self) -> int:
        """0: no profile is written."""
        return 0
