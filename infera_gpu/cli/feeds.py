"""Input arrays from the command line: files, shapes, random values."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from infera_gpu.cli.console import note
from infera_gpu.devices.base import host_memory
from infera_gpu.errors import InferaError, InputError, InvarianceError, OutOfMemoryError, PlanError
from infera_gpu.graph import HostArray
from infera_gpu.spec import TensorSpec, spec_of

Shapes = dict[str, tuple[int, ...]]

_RANDOM_BYTES = 8
"""Of each element while random values are made, before they are converted: float64 and int64."""

MAX_ELEMENTS = sys.maxsize // _RANDOM_BYTES
"""What NumPy can count the bytes of, zeros in the shape taken as ones."""


def read_feeds(options: Sequence[str], inputs: Mapping[str, TensorSpec]) -> dict[str, HostArray]:
    """Arrays from `-i name=x.npy`, `-i x.npy` (the model's only input left), `-i all.npz` (arrays by input name), or
    `-i name=16000` and `-i name=1,2,3`: numbers along the input's last axis, where no file is called so."""
    feeds: dict[str, HostArray] = {}
    for option in options:
        name, equals, path = option.partition("=")
        if not equals or (name not in inputs and Path(option).exists()):
            name, path = "", option
        if name in inputs and (numbers := _numbers(path)) is not None and not Path(path).exists():
            feeds[name] = _of_numbers(option, numbers, inputs[name])
            continue
        loaded = _load(path)
        if isinstance(loaded, dict):
            if name:
                raise InputError(f"-i {option}: an .npz file holds arrays by name; give it without '{name}='")
            feeds |= loaded
            continue
        if not name:
            left = [n for n in inputs if n not in feeds]
            if len(left) != 1:
                raise InputError(f"-i {option}: which input? the model has {_listed(inputs)}; give -i name={path}")
            name = left[0]
        feeds[name] = loaded
    for name in feeds:
        if name not in inputs:
            raise InputError(f"'{name}' is not an input; the model has {_listed(inputs)}")
    return {name: _as_saved(array, inputs[name]) for name, array in feeds.items()}


def _numbers(text: str) -> list[int | float] | None:
    """Numbers with commas in between; None for anything else."""
    try:
        return [int(part) if part.strip().lstrip("+-").isdigit() else float(part) for part in text.split(",")]
    except ValueError:
        return None


def _of_numbers(option: str, numbers: Sequence[int | float], spec: TensorSpec) -> HostArray:
    """The numbers as an array of the input's type, along its last axis."""
    if spec.dtype.kind == "O":
        raise InputError(f"-i {option}: the input takes strings; give them in a .npy file")
    if spec.dtype.kind in "iub" and not all(float(n).is_integer() for n in numbers):
        raise InputError(f"-i {option}: the input is {spec.dtype.name}, expected whole numbers")
    rank = spec.ndim if spec.ranked else int(len(numbers) > 1)
    if not rank and len(numbers) > 1:
        raise InputError(f"-i {option}: the input is one number, {len(numbers)} were given")
    try:
        array = np.array(numbers if rank else numbers[0], object).astype(spec.dtype)
    except (OverflowError, ValueError) as error:
        raise InputError(f"-i {option}: {error}") from None
    return array.reshape((1,) * (rank - 1) + (len(numbers),) if rank else ())


def _as_saved(array: HostArray, spec: TensorSpec) -> HostArray:
    """Files know NumPy's own types only: bfloat16 and its like are saved as bytes without a type."""
    is_bytes = array.dtype.kind == "V" and array.dtype.itemsize == spec.dtype.itemsize
    return array.view(spec.dtype) if is_bytes else array


@contextmanager
def on_random(inputs: Mapping[str, TensorSpec], files: Sequence[str] | None) -> Iterator[None]:
    """What fails in here, and may do so for values or shapes, says that inputs not given are random."""
    try:
        yield
    except InferaError as error:
        if not (said := advice(error, inputs, read_feeds(files or [], inputs))):
            raise
        raise InferaError(f"{error}{said}") from error


def advice(error: InferaError, inputs: Mapping[str, TensorSpec], given: Mapping[str, HostArray]) -> str:
    """What to say behind an error of a run whose inputs are random, but for those `given`: nothing where these are not
    to blame. Random values and shapes need not make sense to a model."""
    blamed = isinstance(error, InputError | PlanError) and not isinstance(error, InvarianceError)
    if not blamed or len(given) == len(inputs):
        return ""
    return ". Inputs not given are random; give sensible ones with --input name=file.npy, or name=1,2 for numbers"


def _load(path: str) -> HostArray | dict[str, HostArray]:
    try:
        with open(path, "rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return _strings_as_objects(loaded)
            with loaded as archive:
                return {name: _strings_as_objects(archive[name]) for name in archive.files}
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; inputs are .npy or .npz files, as in -i name=x.npy") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # damage surfaces as whatever zipfile, zlib, tokenize or an allocation raises
        # To NumPy everything else is a pickle.
        reason = "it is neither, or holds Python objects" if "pickle" in str(error) else error
        raise InputError(f"{path}: not a .npy or .npz file that can be read: {reason}") from None


def _strings_as_objects(array: HostArray) -> HostArray:
    """Files hold strings in fixed width, models take Python's."""
    return array.astype(object) if array.dtype.kind == "U" else array


def read_shapes(options: Sequence[str], inputs: Mapping[str, TensorSpec]) -> Shapes:
    """Shapes from `--shape name=1,3,640,640`, or `--shape 1,3,640,640` where the model has one input."""
    shapes: Shapes = {}
    for option in options:
        name, equals, text = option.rpartition("=")
        if not equals:
            if len(inputs) != 1:
                raise InputError(f"--shape {option}: which input? the model has {_listed(inputs)}; give name={option}")
            name = next(iter(inputs))
        if name not in inputs:
            raise InputError(f"--shape {option}: '{name}' is not an input; the model has {_listed(inputs)}")
        try:
            shapes[name] = tuple(int(d) for d in text.split(",") if d.strip())
        except ValueError:
            raise InputError(f"--shape {option}: '{text}' is not a list of integers such as 1,3,640,640") from None
        if any(d < 0 for d in shapes[name]):
            raise InputError(f"--shape {option}: a dimension is negative")
        if math.prod(d or 1 for d in shapes[name]) > MAX_ELEMENTS:
            raise InputError(f"--shape {option}: no array is that large; expected at most {MAX_ELEMENTS:,} elements")
    return shapes


def free_dimensions(inputs: Mapping[str, TensorSpec], known: Mapping[str, object]) -> list[str]:
    """`input[axis]`, with the symbol if it has one, of every dimension that neither the model nor `known` settles: the
    symbols of the inputs there are settled wherever they stand."""
    settled = {d for name in known if name in inputs for d in inputs[name].shape if isinstance(d, str)}
    return [
        f"{name}[{axis}]" + (f" '{d}'" if d else "")
        for name, spec in inputs.items()
        if name not in known
        for axis, d in enumerate(spec.shape)
        if not isinstance(d, int) and d not in settled
    ]


def random_feeds(
    inputs: Mapping[str, TensorSpec], given: Mapping[str, HostArray], shapes: Shapes, seed: int = 0
) -> dict[str, HostArray]:
    """`given`, and seeded random arrays for the other inputs; free dimensions are 1, or as `given` has their symbol.

    Floats are normally distributed; integers are 0 or 1, so that they are valid as indices, masks and lengths.
    Raises OutOfMemoryError where an array does not fit into memory.
    """
    sizes = {
        symbol: size
        for name, shape in {**shapes, **{n: a.shape for n, a in given.items()}}.items()
        for symbol, size in zip(inputs[name].shape if name in inputs else (), shape, strict=False)
        if isinstance(symbol, str)
    }
    rng = np.random.default_rng(seed)
    made: dict[str, HostArray] = {}
    for name, spec in inputs.items():
        if name not in given:
            usual = tuple(d if isinstance(d, int) else sizes.get(d or "", 1) for d in spec.shape)
            shape = shapes.get(name, usual)
            needed, available = math.prod(shape) * (_RANDOM_BYTES + spec.dtype.itemsize), host_memory()
            if available is not None and needed > available:
                what = f"a random input '{name}' {TensorSpec(shape, spec.dtype)}"
                raise OutOfMemoryError(what, needed=needed, available=available)
            made[name] = _random(rng, spec, shape)
    return {**made, **given}


def gather(
    inputs: Mapping[str, TensorSpec], files: Sequence[str] | None, shapes: Sequence[str] | None, seed: int
) -> dict[str, HostArray]:
    """The arrays of `-i`, random ones for the rest; says on stderr which shapes were chosen where any was free."""
    given, sizes = read_feeds(files or [], inputs), read_shapes(shapes or [], inputs)
    feeds = random_feeds(inputs, given, sizes, seed)
    free = free_dimensions(inputs, {**sizes, **given})
    if free:
        note(f"free dimensions {', '.join(free)}: using " + ", ".join(f"{n} {spec_of(a)}" for n, a in feeds.items()))
    return feeds


def _random(rng: np.random.Generator, spec: TensorSpec, shape: tuple[int, ...]) -> HostArray:
    if spec.dtype.kind == "O":
        return np.full(shape, "text", object)
    if spec.dtype.kind in "iub":
        return rng.integers(0, 2, shape).astype(spec.dtype)
    return np.asarray(rng.standard_normal(shape)).astype(spec.dtype)


def _listed(inputs: Mapping[str, TensorSpec]) -> str:
    return ", ".join(f"'{name}' {spec}" for name, spec in inputs.items()) or "no inputs"
