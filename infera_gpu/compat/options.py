"""onnxruntime's options: typed attributes, most of which have nothing to act on here."""

from __future__ import annotations

import operator
from dataclasses import MISSING, dataclass, field
from enum import IntEnum
from typing import Any

from infera_gpu.errors import InferaError, InputError


class GraphOptimizationLevel(IntEnum):
    """onnxruntime's levels: anything above ORT_DISABLE_ALL runs infera_gpu's passes."""

    ORT_DISABLE_ALL = 0
    ORT_ENABLE_BASIC = 1
    ORT_ENABLE_EXTENDED = 2
    ORT_ENABLE_LAYOUT = 3
    ORT_ENABLE_ALL = 99


class ExecutionMode(IntEnum):
    """Whether onnxruntime runs independent nodes at once. infera_gpu runs the steps of its plan in order."""

    ORT_SEQUENTIAL = 0
    ORT_PARALLEL = 1


def _converted(name: str, kind: type, value: Any) -> Any:
    """`value` as `kind`. Raises TypeError, as onnxruntime does, naming the option."""
    try:
        if issubclass(kind, IntEnum):
            return kind(int(value))
        if kind is int:
            return operator.index(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} is {value!r}, expected {kind.__name__}") from None
    if not isinstance(value, kind):
        raise TypeError(f"{name} is {value!r}, expected {kind.__name__}")
    return value


@dataclass(slots=True, eq=False, kw_only=True)
class _Options:
    """Attributes with a type each, and entries by key. Assigning any other attribute raises AttributeError."""

    _entries: dict[str, str] = field(default_factory=dict, init=False, repr=False)

    def __setattr__(self, name: str, value: Any) -> None:
        option = self.__dataclass_fields__.get(name)
        if option is not None and option.default is not MISSING:
            value = _converted(name, type(option.default), value)
        object.__setattr__(self, name, value)

    def _add(self, key: str, value: str) -> None:
        self._entries[_converted("the key of an entry", str, key)] = _converted(f"entry '{key}'", str, value)

    def _get(self, key: str) -> str:
        if key not in self._entries:
            raise RuntimeError(f"{type(self).__name__} has no configuration entry '{key}'")  # onnxruntime's type
        return self._entries[key]


@dataclass(slots=True, eq=False, kw_only=True)
class SessionOptions(_Options):
    """onnxruntime's session options.

    These have an effect: `graph_optimization_level`; `intra_op_num_threads`, the threads of a run on the
    CPU (0: see `infera_gpu.load`); and free dimensions by name. `enable_profiling` and
    `optimized_model_filepath` ask for files that are not written: the session warns. All else is kept and ignored.
    """

    enable_cpu_mem_arena: bool = True
    enable_mem_pattern: bool = True
    enable_mem_reuse: bool = True
    enable_profiling: bool = False
    execution_mode: ExecutionMode = ExecutionMode.ORT_SEQUENTIAL
    graph_optimization_level: GraphOptimizationLevel = GraphOptimizationLevel.ORT_ENABLE_ALL
    inter_op_num_threads: int = 0
    intra_op_num_threads: int = 0
    log_severity_level: int = -1
    log_verbosity_level: int = 0
    logid: str = ""
    optimized_model_filepath: str = ""
    profile_file_prefix: str = "onnxruntime_profile_"
    use_deterministic_compute: bool = False
    use_per_session_threads: bool = True
    free_dimensions: dict[str, int] = field(default_factory=dict, init=False, repr=False)

    def add_session_config_entry(self, key: str, value: str) -> None:
        """Keeps the entry; none has an effect."""
        self._add(key, value)

    def get_session_config_entry(self, key: str) -> str:
        """The entry. Raises RuntimeError where there is none."""
        return self._get(key)

    def add_free_dimension_override_by_name(self, name: str, size: int) -> None:
        """Every dimension with the symbol `name` is `size`. Raises InputError for a negative size."""
        count = _converted(f"the size of '{name}'", int, size)
        if count < 0:
            raise InputError(f"the size of dimension '{name}' is {count}, expected 0 or more")
        self.free_dimensions[name] = count

    def add_free_dimension_override_by_denotation(self, denotation: str, size: int) -> None:
        """Raises InferaError: denotations are not read from the model."""
        raise InferaError(
            f"dimensions cannot be overridden by denotation ('{denotation}'); "
            "use add_free_dimension_override_by_name with the dimension's symbol"
        )

    def register_custom_ops_library(self, path: str) -> None:
        """Raises InferaError: onnxruntime's compiled operators cannot be loaded."""
        raise InferaError(
            f"'{path}': operators compiled for onnxruntime cannot be loaded; "
            "declare them in Python, see CONTRIBUTING.md, 'Add an operator'"
        )

    def unwritten(self) -> list[str]:
        """What these options ask for that is not done, and what to do instead."""
        missing = []
        if self.enable_profiling:
            missing.append(
                "enable_profiling: no profile is written; InferenceSession.session.profile(feeds) times every step"
            )
        if self.optimized_model_filepath:
            missing.append(
                "optimized_model_filepath: no model is written; "
                "print(InferenceSession.session.plan_for(inputs)) shows what runs"
            )
        return missing


@dataclass(slots=True, eq=False, kw_only=True)
class RunOptions(_Options):
    """onnxruntime's run options. A run that is given `terminate=True` is refused; nothing else has an effect.

    Setting `terminate` while a run goes on does not end it.
    """

    log_severity_level: int = -1
    log_verbosity_level: int = 0
    logid: str = ""
    only_execute_path_to_fetches: bool = False
    terminate: bool = False

    def add_run_config_entry(self, key: str, value: str) -> None:
        """Keeps the entry; none has an effect."""
        self._add(key, value)

    def get_run_config_entry(self, key: str) -> str:
        """The entry. Raises RuntimeError where there is none."""
        return self._get(key)


def check_run_options(options: object) -> None:
    """Raises TypeError for what are no RunOptions, InferaError where they end the run before it begins."""
    if options is None:
        return
    if not isinstance(options, RunOptions):
        raise TypeError(f"run_options is {type(options).__name__}, expected infera_gpu.RunOptions")
    if options.terminate:
        raise InferaError("the run was not started: RunOptions.terminate is set")


def _severity(level: int) -> None:
    if not 0 <= level <= 4:
        raise InputError(f"severity {level} is out of range; 0 verbose, 1 info, 2 warning, 3 error, 4 fatal")


def set_default_logger_severity(severity: int) -> None:
    """No effect: what there is to log goes through Python's logging. Raises InputError outside 0 to 4."""
    _severity(severity)


def set_default_logger_verbosity(level: int) -> None:
    """No effect: what there is to log goes through Python's logging."""


def set_seed(seed: int) -> None:
    """No effect: infera_gpu has no operator that draws random numbers."""
