"""com.microsoft: mixtures of experts, with float and with quantised weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from infera_gpu.op import Case, Op, Site, f32
from infera_gpu.ops._families import integers, uniform
from infera_gpu.ops._ms import ms_op
from infera_gpu.spec import Array, TensorSpec
from infera_kernels.portable.activation import activation
from infera_kernels.portable.moe import Layer, mixture, routes, swiglu
from infera_kernels.portable.quant import aligned, dequantize, unpacked

_ACTIVATIONS = {"relu": "relu", "gelu": "gelu_tanh", "silu": "swish", "identity": "", "swiglu": ""}
_REFUSED = ("use_sparse_mixer", "swiglu_limit_after_activation")


@dataclass(frozen=True, slots=True)
class _Linear:
    """Which inputs hold the weights (experts, rows, columns) of one layer of all experts, and what goes with them."""

    name: str
    weights: int
    bias: int
    scales: int = -1
    zeros: int = -1


def _bits(site: Site, layer: _Linear) -> int:
    """Bits of a quantised weight; 8 for floats, of which each is an element."""
    if layer.scales < 0:
        return 8
    own = site.attrs[f"{layer.name}_expert_weight_bits"]
    bits = int(site.attrs["expert_weight_bits"] if own is None else own)
    if bits not in (2, 4, 8):
        raise site.fail(f"weights of {bits} bits are not supported, expected 2, 4 or 8")
    return bits


def _gated(site: Site) -> bool:
    return bool(site.attrs["activation_type"] == "swiglu")


def _check_layer(site: Site, layer: _Linear, experts: int, rows: int, columns: int) -> None:
    per, weights = 8 // _bits(site, layer), site.spec(layer.weights)
    if weights.dims != (experts, rows, columns // per) or columns % per:
        raise site.fail(f"{layer.name} is {weights}, expected {experts} times {rows} x {columns} weights")
    wanted: dict[int, tuple[int, ...]] = {layer.bias: (experts, rows)}
    if layer.scales >= 0:
        size = int(site.attrs["block_size"] or 0)
        blocks = -(-columns // size) if size else 0
        wanted[layer.scales] = (experts, rows, blocks) if size else (experts, rows)
        wanted[layer.zeros] = (experts, rows, -(-blocks // per)) if size else (experts, -(-rows // per))
        site.spec(layer.scales)
    for i, dims in wanted.items():
        if site.has(i) and site.spec(i).dims != dims:
            raise site.fail(f"input {i} is {site.spec(i)}, expected {list(dims)} for {layer.name} {weights}")


def _check(site: Site, first: _Linear, second: _Linear, unsupported: tuple[int, ...], given: int) -> tuple[TensorSpec]:
    x, router = site.spec(0), site.spec(1)
    kind, fusion = site.attrs["activation_type"], int(site.attrs["swiglu_fusion"])
    if kind not in _ACTIVATIONS:
        raise site.fail(f"activation_type '{kind}' is not one of {', '.join(_ACTIVATIONS)}")
    if any(site.has(i) for i in unsupported) or (_gated(site) and fusion not in (1, 2)):
        raise site.fail("a third layer, and swiglu that is not fused with the first, are not supported")
    if site.attrs.get("quant_type", "int") != "int" or site.attrs.get("weights_prepacked", -1) == 1:
        raise site.fail("weights of other types than integers, and those packed for a device, are not supported")
    refused = [name for name in _REFUSED if site.attrs.get(name)]
    if refused:
        raise site.fail(f"{refused[0]} is not supported")
    if x.ndim not in (2, 3) or router.dims != (math.prod(x.dims[:-1]), *router.dims[1:]) or router.ndim != 2:
        raise site.fail(f"router_probs are {router}, expected a row of experts for each token of {x}")
    if given >= 0 and site.has(given) and site.spec(given).dims != router.dims:
        raise site.fail(f"router_weights are {site.spec(given)}, expected the shape of router_probs, {router}")
    experts, hidden = router.dims[1], x.dims[-1]
    if not 1 <= int(site.attrs["k"]) <= experts:
        raise site.fail(f"k is {site.attrs['k']}, expected 1 to {experts} experts")
    if site.spec(second.weights).ndim != 3:
        raise site.fail(f"{second.name} is {site.spec(second.weights)}, expected three axes")
    inner = site.spec(second.weights).dims[2] * (8 // _bits(site, second))
    _check_layer(site, first, experts, inner * (2 if _gated(site) else 1), hidden)
    _check_layer(site, second, experts, hidden, inner)
    return (x,)


def _weights(xp: Any, site: Site, layer: _Linear, ins: tuple[Array | None, ...], expert: int) -> Array:
    """One expert's weights (rows, columns) in float32."""
    w, *parameters = (ins[i] if 0 <= i < len(ins) else None for i in (layer.weights, layer.scales, layer.zeros))
    assert w is not None
    w, scale, zero = w[expert], *(None if p is None else p[expert] for p in parameters)
    if scale is None:
        return w.astype(np.float32)
    bits, size = _bits(site, layer), int(site.attrs["block_size"] or 0)
    q = unpacked(xp, w, bits)
    point = xp.full(scale.shape, 1 << (bits - 1), np.uint8) if zero is None else unpacked(xp, zero, bits)
    point = point[..., : scale.shape[-1]]
    factor, shift = (aligned(xp, p, q.shape, 1 if size else 0, size) for p in (scale, point))
    return dequantize(xp, q, factor, shift, np.dtype(np.float32))


def _layer(xp: Any, site: Site, layer: _Linear, ins: tuple[Array | None, ...]) -> Layer:
    bias = ins[layer.bias] if layer.bias < len(ins) else None

    def apply(expert: int, x: Array) -> Array:
        made = x @ _weights(xp, site, layer, ins, expert).T
        return made if bias is None else made + bias[expert].astype(np.float32)

    return apply


def _act(xp: Any, site: Site) -> Callable[[Array], Array]:
    name, limit = _ACTIVATIONS[site.attrs["activation_type"]], site.attrs["swiglu_limit"]
    if not _gated(site):
        return lambda x: activation(xp, name, x) if name else x
    return lambda x: swiglu(
        xp,
        x,
        alpha=site.attrs["activation_alpha"],
        beta=site.attrs["activation_beta"],
        limit=math.inf if limit is None else limit,
        interleaved=int(site.attrs["swiglu_fusion"]) == 1,
    )


def _moe(
    name: str, first: _Linear, second: _Linear, unsupported: tuple[int, ...], router: int, cases: Any, **attrs: Any
) -> Op:
    """A mixture of experts; input `router`, where it is there, has the weights of the experts that are chosen.

    As in onnxruntime, QMoE's weights add up to 1 whatever is asked, unless they are given.
    """

    def infer(site: Site) -> tuple[TensorSpec]:
        return _check(site, first, second, unsupported, router)

    def compute(xp: Any, site: Site, *ins: Array | None) -> Array:
        x, logits = ins[:2]
        assert x is not None
        given = ins[router] if 0 <= router < len(ins) else None
        normalize = bool(site.attrs["normalize_routing_weights"]) or (first.scales >= 0 and given is None)
        chosen = routes(xp, logits, int(site.attrs["k"]), given, normalize=normalize)
        layers = _layer(xp, site, first, ins), _layer(xp, site, second, ins)
        made = mixture(xp, x.reshape(-1, x.shape[-1]), chosen, layers[0], _act(xp, site), layers[1], x.shape[-1])
        return made.reshape(x.shape).astype(x.dtype)

    common: dict[str, Any] = {
        "activation_alpha": 1.0,
        "activation_beta": 0.0,
        "activation_type": "relu",
        "k": 1,
        "normalize_routing_weights": 0,
        "swiglu_fusion": 0,
        "swiglu_limit": None,
        "swiglu_limit_after_activation": 0,
        "use_sparse_mixer": 0,
    }
    return ms_op(name, infer, compute, cases, needs=(0, 1, first.weights, second.weights), **common, **attrs)


_X, _ROUTER = f32(5, 8), f32(5, 3)
_PLAIN = (_X, _ROUTER, f32(3, 6, 8), f32(3, 6), f32(3, 8, 6), f32(3, 8))
_SWIGLU: dict[str, Any] = {
    "activation_type": "swiglu",
    "swiglu_fusion": 1,
    "activation_alpha": 1.702,
    "activation_beta": 1.0,
    "swiglu_limit": 1.5,
}


def _quantized(bits: int, block: int = 0, zeros: bool = False) -> tuple[Any, ...]:
    """Three experts of 64 and 32 rows with 32 inputs each."""
    per, blocks = 8 // bits, (32 // block,) if block else ()
    ins: list[Any] = [
        f32(5, 32),
        _ROUTER,
        integers(1, np.uint8, 3, 64, 32 // per),
        uniform(2, 0.01, 0.05, 3, 64, *blocks),
        f32(3, 64),
    ]
    ins += [integers(3, np.uint8, 3, 32, 32 // per), uniform(4, 0.01, 0.05, 3, 32, *blocks), f32(3, 32)]
    if zeros:
        packed = [(n, -(-(32 // block) // per)) if block else (-(-n // per),) for n in (64, 32)]
        ins += [None, None, None, *(integers(5, np.uint8, 3, *dims) for dims in packed)]
    return tuple(ins)


OPS: tuple[Op, ...] = (
    _moe(
        "MoE",
        _Linear("fc1", 2, 3),
        _Linear("fc2", 4, 5),
        (6, 7),
        -1,
        (
            *(Case(kind, _PLAIN, {"activation_type": kind, "k": 2}) for kind in ("relu", "gelu", "silu", "identity")),
            Case(
                "swiglu",
                (f32(2, 3, 8), f32(6, 3), f32(3, 12, 8), f32(3, 12), f32(3, 8, 6), f32(3, 8)),
                {**_SWIGLU, "k": 2, "normalize_routing_weights": 1},
            ),
            Case("no_bias", (_X, _ROUTER, f32(3, 6, 8), None, f32(3, 8, 6)), {"normalize_routing_weights": 1}),
        ),
    ),
    _moe(
        "QMoE",
        _Linear("fc1", 2, 4, 3, 11),
        _Linear("fc2", 5, 7, 6, 12),
        (8, 9, 10, 13, 15, 16, 17, 18, 19, 20),
        14,
        (
            Case("rows", _quantized(4), {**_SWIGLU, "k": 2, "normalize_routing_weights": 1}),
            Case("row_zeros", _quantized(4, zeros=True), {**_SWIGLU, "k": 2}),
            Case("bytes", _quantized(8), {**_SWIGLU, "expert_weight_bits": 8}),
            Case("blocks", _quantized(4, 16), {**_SWIGLU, "k": 2, "block_size": 16}),
            Case("weights", (*_quantized(4, zeros=True), None, f32(5, 3)), {**_SWIGLU, "k": 2}, low=0),
            Case("block_zeros", _quantized(4, 16, zeros=True), {**_SWIGLU, "k": 2, "block_size": 16}),
        ),
        accuracy_level=0,
        block_size=None,
        expert_weight_bits=4,
        fc1_expert_weight_bits=None,
        fc2_expert_weight_bits=None,
        fc3_expert_weight_bits=None,
        quant_type="int",
        weights_prepacked=-1,
    ),
)
