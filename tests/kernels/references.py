"""What the interpreter suites share: references in float64, and a look at what ran.

The suites are run by test_interpreter.py with TRITON_INTERPRET=1, in a process of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from infera_kernels.launch import InterpreterLauncher, Launch
from tests.kernels.support import Array

F32 = np.dtype(np.float32)
_erf = np.vectorize(math.erf, otypes=[np.float64])


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


UNARY: dict[str, tuple[Callable[[Array], Array], float, float]] = {
    "abs": (np.abs, -9, 9),
    "acos": (np.arccos, -1, 1),
    "acosh": (np.arccosh, 1, 50),
    "asin": (np.arcsin, -1, 1),
    "asinh": (np.arcsinh, -50, 50),
    "atan": (np.arctan, -50, 50),
    "atanh": (np.arctanh, -0.99, 0.99),
    "ceil": (np.ceil, -9, 9),
    "celu": (lambda x: np.where(x < 0, np.expm1(x), x), -9, 9),
    "clip": (lambda x: np.clip(x, -0.5, 1.25), -9, 9),
    "cos": (np.cos, -9, 9),
    "cosh": (np.cosh, -9, 9),
    "elu": (lambda x: np.where(x < 0, np.expm1(x), x), -9, 9),
    "erf": (_erf, -4, 4),
    "exp": (np.exp, -9, 9),
    "floor": (np.floor, -9, 9),
    "gelu": (lambda x: 0.5 * x * (1 + _erf(x / math.sqrt(2))), -9, 9),
    "gelu_tanh": (lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))), -9, 9),
    "hard_sigmoid": (lambda x: np.clip(0.2 * x + 0.5, 0, 1), -9, 9),
    "hard_swish": (lambda x: x * np.clip(x / 6 + 0.5, 0, 1), -9, 9),
    "leaky_relu": (lambda x: np.where(x < 0, 0.01 * x, x), -9, 9),
    "log": (np.log, 0.01, 50),
    "mish": (lambda x: x * np.tanh(np.logaddexp(0, x)), -9, 9),
    "neg": (np.negative, -9, 9),
    "over": (lambda x: x, -9, 9),
    "reciprocal": (lambda x: 1 / x, 0.1, 9),
    "relu": (lambda x: np.maximum(x, 0), -9, 9),
    "rint": (np.rint, -9, 9),
    "selu": (lambda x: 1.0507010221481323 * np.where(x < 0, 1.6732631921768188 * np.expm1(x), x), -9, 9),
    "shrink": (lambda x: np.where(np.abs(x) > 0.5, x, 0), -2, 2),
    "sigmoid": (_sigmoid, -20, 20),
    "sign": (np.sign, -9, 9),
    "silu": (lambda x: x * _sigmoid(x), -20, 20),
    "sin": (np.sin, -9, 9),
    "sinh": (np.sinh, -9, 9),
    "softplus": (lambda x: np.logaddexp(0, x), -20, 20),
    "softsign": (lambda x: x / (1 + np.abs(x)), -9, 9),
    "sqrt": (np.sqrt, 0, 50),
    "swish": (lambda x: x * _sigmoid(x), -20, 20),
    "tan": (np.tan, -1.5, 1.5),
    "tanh": (np.tanh, -9, 9),
    "thresholded_relu": (lambda x: np.where(x > 1, x, 0), -9, 9),
}

BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "fmod": np.fmod,
    "mod": np.mod,
    "pow": np.power,
    "min": np.minimum,
    "max": np.maximum,
    "equal": np.equal,
    "not_equal": np.not_equal,
    "less": np.less,
    "less_equal": np.less_equal,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
    "and": np.logical_and,
    "or": np.logical_or,
    "xor": np.logical_xor,
    "prelu": lambda x, y: np.where(x < 0, y * x, x),
    "bitwise_and": np.bitwise_and,
    "bitwise_or": np.bitwise_or,
    "bitwise_xor": np.bitwise_xor,
    "shift_left": np.left_shift,
    "shift_right": np.right_shift,
}

FUNCTION_ERROR = 4e-7
"""What a float32 evaluation may lose relative to the largest result, rounding of the result aside."""


def only(interpreter: InterpreterLauncher, kernel: Any) -> Launch:
    """The single launch that ran, of this kernel."""
    (launch,) = interpreter.launches
    assert launch.kernel == kernel.__name__
    return launch


def ids(value: object) -> str | None:
    return value.name if isinstance(value, np.dtype) else None
