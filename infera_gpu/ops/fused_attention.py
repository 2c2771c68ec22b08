"""The fused attention that graph passes make."""

from __future__ import annotations

from typing import Any

import numpy as np

from infera_gpu.graph import HostArray, Node, made_name
from infera_gpu.op import Buffers, Call, Case, Cases, Expansion, Kernel, Op, Site, f32
from infera_gpu.ops import _jit
from infera_gpu.ops._families import ZERO, i64, plain, reshapes_to, uniform
from infera_gpu.ops._later import Kinds
from infera_gpu.spec import Array, TensorSpec, broadcast_shape
from infera_kernels.cpu import attention as cpu
from infera_kernels.portable.attention import additive, fused
from infera_kernels.portable.attention import attention as standard


def _repeats(site: Site) -> int | None:
    """How often each head of keys and values is repeated; None where they are repeated otherwise."""
    if not site.attrs["repeated"]:
        return 1
    found = set()
    for x, wide, flat in ((1, 6, 7), (2, 8, 9)):
        dims, target, back = site.spec(x).dims, site.ints(wide), site.ints(flat)
        if len(dims) != 4 or target is None or back is None or len(target) != 5:
            return None
        repeats = target[2]
        wide_dims, flat_dims = (*dims[:2], repeats, *dims[2:]), (dims[0], dims[1] * repeats, *dims[2:])
        expands = all(t in (1, d) for t, d in zip(target, wide_dims, strict=True))
        if not expands or not reshapes_to(back, wide_dims, flat_dims):
            return None
        found.add(repeats)
    return found.pop() if len(found) == 1 else None


def _are_alike(site: Site) -> bool:
    """Where that is asked for: whether queries and keys have the same leading axes, and values those of the scores."""
    if not site.attrs["alike"]:
        return True
    q, kt, v, *masks = (site.spec(i).dims[:-2] for i in range(6) if site.has(i))
    try:
        return kt == q and v == broadcast_shape(q, *masks)
    except ValueError:
        return False


def _lead(site: Site) -> tuple[int, ...] | None:
    """The leading axes of the result; None where the operands do not fit."""
    if not _are_alike(site):
        return None
    repeats, (q, kt, v) = _repeats(site), (site.spec(i).dims for i in range(3))
    if repeats is None:
        return None
    if site.attrs["swap_keys"]:
        kt = (*kt[:-2], *kt[:-3:-1])
    if site.attrs["repeated"]:
        kt, v = ((x[0], x[1] * repeats, *x[2:]) for x in (kt, v))
        if len(q) != 4 or q[1] != kt[1]:
            return None
    if min(map(len, (q, kt, v))) < 2 or q[-1] != kt[-2] or kt[-1] != v[-2]:
        return None
    scores = q[-2], kt[-1]
    extra = [site.spec(i).dims for i in (3, 4, 5) if site.has(i)]
    if any(d not in (1, s) for x in extra for d, s in zip(x[:-3:-1], scores[::-1], strict=False)):
        return None
    if site.attrs["guarded"] == 2 and any(x[-1:] != scores[1:] for x in extra):
        return None
    try:
        lead = broadcast_shape(*[x[:-2] for x in (q, kt, v, *extra)])
    except ValueError:
        return None
    if site.attrs["guarded"] == 2 and (lead != q[:-2] or kt[:1] != q[:1] or kt[:-2] != v[:-2]):
        return None
    return lead


def _infer(site: Site) -> tuple[TensorSpec]:
    lead, q, v = _lead(site), site.spec(0), site.spec(2)
    if lead is None:
        raise site.fail(f"{', '.join(str(s) for s in site.ins if s is not None)} do not fit each other")
    dims = (*lead, q.dims[-2], v.dims[-1])
    if site.attrs["heads_last"]:
        if len(dims) != 4:
            raise site.fail(f"heads_last needs four axes, the result has {list(dims)}")
        dims = (dims[0], dims[2], dims[1], dims[3])
    return (TensorSpec(dims, q.dtype),)


def _parts(site: Site) -> Expansion | None:
    """The operators apart, where vectors are multiplied or a mask or the condition is wider than the scores."""
    if _lead(site) is not None or not _are_alike(site):
        return None
    attrs, names = site.attrs, (*site.node.inputs, *[""] * (10 - len(site.node.inputs)))
    q, kt, v, mask, condition, further, *shapes = names
    out = site.node.outputs[0]
    constants: dict[str, HostArray] = {}
    nodes: list[Node] = []

    def number(value: float) -> str:
        name = made_name(out, f"number {len(constants)}")
        constants[name] = np.array(value, site.spec(0).dtype)
        return name

    def add(op: str, *inputs: str, opset: int = 13, **kwargs: Any) -> str:
        name = made_name(out, f"part {len(nodes)}")
        nodes.append(Node(op, inputs, (name,), kwargs, name=f"{site.node.name}/{op} {len(nodes)}", opset=opset))
        return name

    def scores_apart(kt: str) -> str:
        if attrs["swap_keys"]:
            axes = tuple(range(len(site.ints(7) or site.spec(1).dims)))
            kt = add("Transpose", kt, perm=(*axes[:-2], *axes[:-3:-1]))
        x = add("MatMul", q, kt)
        if attrs["scale"] != 1:
            x = add("Mul", x, number(attrs["scale"]))
        if attrs["cap"]:
            cap = number(attrs["cap"])
            x = add("Mul", add("Tanh", add("Div", x, cap)), cap)
        if condition:
            fill = number(attrs["fill"])
            x = add("Where", condition, *((fill, x) if attrs["fill_where"] else (x, fill)))
        for term in filter(None, (mask, further)):
            x = add("Add", x, term)
        x = add("Softmax", x, axis=-1)
        if attrs["guarded"]:
            x = add("Where", add("IsNaN", x), number(0), x)
        return add("MatMul", x, v)

    if attrs["repeated"]:
        axis = made_name(out, "axis")
        constants[axis] = i64(2)
        kt, v = (
            add("Reshape", add("Expand", add("Unsqueeze", x, axis), wide), flat)
            for x, wide, flat in ((kt, *shapes[:2]), (v, *shapes[2:]))
        )
    if attrs["guarded"] == 2:
        x = add("Attention", q, kt, v, mask or condition, opset=23, scale=attrs["scale"], softcap=attrs["cap"])
    else:
        x = scores_apart(kt)
    if attrs["heads_last"]:
        x = add("Transpose", x, perm=(0, 2, 1, 3))
    add("Identity", x)
    nodes[-1] = Node("Identity", (x,), (out,), name=f"{site.node.name}/Identity")
    return Expansion(tuple(nodes), constants)


def _apart(x: Array, heads: int, repeats: int, rows: int) -> Array:
    """(..., heads, rows, size) as (..., keys' heads, repeats, rows, size), or (..., keys' heads, repeats, size) where
    there is one row: a view. One head goes for all."""
    if x.ndim < 3:
        return x
    split = (heads // repeats, repeats) if x.shape[-3] == heads else (1, 1)
    kept = x.shape[-1:] if rows == 1 else x.shape[-2:]
    return x.reshape(*x.shape[:-3], *split, *kept, copy=False)


def _operands(site: Site, io: Buffers) -> tuple[tuple[Array, Array, Array, Array], list[Array], Array | None]:
    """(queries, transposed keys, values, result), masks and condition as the CPU's kernels take them: views."""
    attrs, (q, kt, v), out = site.attrs, io.ins[:3], io.outs[0]
    masks, condition = [io.ins[i] for i in (3, 5) if site.has(i)], io.ins[4] if site.has(4) else None
    if attrs["swap_keys"]:
        kt = kt.swapaxes(-1, -2)
    if attrs["heads_last"]:
        out = out.swapaxes(1, 2)
    repeats = _repeats(site)
    if attrs["repeated"] and repeats is not None:
        heads, rows = q.shape[1:3]
        q, out, *masks = (_apart(x, heads, repeats, rows) for x in (q, out, *masks))
        condition = None if condition is None else _apart(condition, heads, repeats, rows)
        if rows > 1:
            kt, v = kt[:, :, None], v[:, :, None]
    return (q, kt, v, out), masks, condition


def _bind(site: Site, io: Buffers) -> list[Call]:
    attrs, (operands, masks, condition) = site.attrs, _operands(site, io)
    first, parts = cpu.attention(
        *operands,
        io.scratch,
        cpu.Options(
            scale=attrs["scale"],
            cap=attrs["cap"],
            fill=attrs["fill"],
            fill_where=bool(attrs["fill_where"]),
            zero=ZERO[attrs["guarded"]],
        ),
        masks=masks,
        condition=condition,
        parts=io.threads,
    )
    return first + (io.parallel(parts) if len(parts) > 1 else parts[0])


def _compute(
    xp: Any,
    site: Site,
    q: Array,
    kt: Array,
    v: Array,
    mask: Array | None = None,
    condition: Array | None = None,
    further: Array | None = None,
    *shapes: Array | None,
) -> Array:
    attrs, repeats = site.attrs, _repeats(site) or 1
    if repeats > 1:
        kt, v = (xp.repeat(x, repeats, axis=1) for x in (kt, v))
    if attrs["guarded"] == 2:
        given = condition if mask is None else mask
        bias = None if given is None else additive(xp, given, kt.shape[-2], q.dtype)
        y, _ = standard(xp, q, kt, v, bias, scale=attrs["scale"], softcap=attrs["cap"])
        return y.swapaxes(1, 2) if attrs["heads_last"] else y
    keep = None if condition is None else condition if not attrs["fill_where"] else xp.logical_not(condition)
    y = fused(
        xp,
        q,
        kt.swapaxes(-1, -2) if attrs["swap_keys"] else kt,
        v,
        [m for m in (mask, further) if m is not None],
        keep,
        scale=attrs["scale"],
        fill=attrs["fill"],
        guarded=bool(attrs["guarded"]),
        cap=attrs["cap"],
    )
    return y.swapaxes(1, 2) if attrs["heads_last"] else y


def _supported(site: Site) -> bool:
    floats = [s for i, s in enumerate(site.ins[:6]) if s is not None and i != 4]
    return all(s.dtype in (np.float32, np.float64) for s in floats) and all(s.size for s in (*floats, *site.outs))


def _compiles(site: Site) -> bool:
    """Whether the compiled kernel has what attributes and inputs ask for. Masks of one column would be copied to the
    size of the scores."""
    floats = all(s.dtype == np.float32 for s in site.ins[:6] if s is not None)
    narrow = any(site.spec(i).dims[-1:] != site.spec(2).dims[-2:-1] for i in (3, 5) if site.has(i))
    plain = not narrow and not site.has(4) and not site.attrs["cap"]
    return floats and plain and _supported(site) and site.outs[0].ndim <= 5


FEWEST_QUERIES, FEW_QUERIES, KEYS = 8, 16, 24
"""Queries from which packing the keys and values that they share pays: beside as many keys for each, and beside any."""


def _shares_keys(site: Site) -> bool:
    queries, keys = site.spec(0).dims[-2] * (_repeats(site) or 1), site.spec(2).dims[-2]
    return queries >= FEW_QUERIES or (queries >= FEWEST_QUERIES and keys <= KEYS * queries)


def _repeated(rows: int, mask: TensorSpec) -> tuple[Any, ...]:
    """Six heads of queries to two of keys and values."""
    wide, flat = (2, 2, 3, 7), (2, 6, 7)
    shapes = (i64(*wide, 4), i64(*flat, 4), i64(*wide, 6), i64(2, -1, 7, 6))
    return (f32(2, 6, rows, 4), f32(2, 2, 7, 4), f32(2, 2, 7, 6), mask, None, None, *shapes)


def _cases() -> tuple[Case, ...]:
    q, k, v = f32(2, 3, 5, 4), f32(2, 3, 4, 7), f32(2, 3, 7, 6)
    seen = uniform(0, 0, 1, 2, 1, 5, 7) < 0.7
    low = np.where(seen, 0, -np.inf).astype(np.float32)
    low[0, 0, 2] = -np.inf
    far = f32(1, 1, 2100, 4), f32(1, 1, 4, 32), f32(1, 1, 32, 6)
    return (
        Case("plain", (q, k, v)),
        Case("scaled", (q, k, v), {"scale": 0.5}),
        Case("mask", (q, k, v, f32(2, 1, 1, 7)), {"scale": 0.5, "heads_last": 1}),
        Case("wide_mask", (f32(1, 1, 5, 4), f32(1, 1, 4, 7), f32(1, 1, 7, 6), f32(2, 3, 5, 7))),
        Case("nothing_seen", (q, k, v, low)),
        Case("guarded", (q, k, v, low), {"guarded": 1, "scale": 0.5}),
        Case(
            "standard",
            (q, f32(2, 3, 7, 4), v, low),
            {"guarded": 2, "scale": 0.5, "swap_keys": 1, "heads_last": 1},
        ),
        Case(
            "standard_seen",
            (q, f32(2, 3, 7, 4), v, None, seen & (np.arange(5) != 1)[:, None]),
            {"guarded": 2, "scale": 0.5, "swap_keys": 1, "fill": -np.inf, "cap": 2.0},
        ),
        Case("kept", (q, k, v, None, seen), {"fill": -np.inf}),
        Case("filled", (q, k, v, f32(5, 7), seen[0, 0]), {"fill": -1e4, "fill_where": 1}),
        Case("capped", (q, k, v, low, seen), {"scale": 0.7, "cap": 1.5, "fill": -1e4}),
        Case("cap_is_scale", (q, k, v), {"scale": 0.5, "cap": 0.5}),
        Case("two_masks", (q, k, v, f32(1, 3, 5, 7), None, f32(2, 1, 1, 7)), {"scale": 0.5}),
        Case("keys", (q, f32(2, 1, 7, 4), v), {"swap_keys": 1, "scale": 0.5}),
        Case("repeated", _repeated(5, f32(2, 1, 5, 7)), {"swap_keys": 1, "repeated": 1, "scale": 0.5}),
        Case("repeated_step", _repeated(1, f32(2, 6, 1, 7)), {"swap_keys": 1, "repeated": 1, "heads_last": 1}),
        Case("alike", (f32(1, 3, 5, 4), f32(1, 3, 4, 7), f32(2, 3, 7, 6), f32(2, 1, 1, 7)), {"alike": 1, "scale": 0.5}),
        Case("matrices", (f32(5, 4), f32(4, 7), f32(7, 6)), {"scale": 2.0}),
        Case("one_query", (f32(2, 3, 1, 4), f32(2, 1, 4, 7), f32(2, 1, 7, 6)), {"heads_last": 1}),
        Case("blocks", far, {"scale": 0.3}),
        Case("many_keys", (f32(1, 2, 1, 8), f32(1, 2, 8, 600), f32(1, 2, 600, 8)), {"scale": 0.3}),
        Case("no_queries", (f32(2, 3, 0, 4), k, v)),
    )


# Y = softmax(scale Q @ KT + mask + further, axis -1) @ V by MatMul's rules; KT are the keys with their last two axes
# swapped, or with swap_keys = 1 as they are. With a cap scaled scores s become cap tanh(s / cap) first. Where the
# boolean condition equals fill_where, a score is `fill` before the masks are added. With guarded = 1 weights that are
# NaN become 0. With guarded = 2 it is ONNX's Attention: keys are as they are, there is one mask, or a condition with a
# fill of -inf, as wide as the keys, queries whose scores are all -inf give 0, and batches are of one size. With
# heads_last = 1 Y has its axes 1 and 2 swapped: (batch, sequence, heads, size). With repeated = 1 each head of keys and
# values serves several of queries, one after the other; inputs 6 to 9 are the shapes that keys, and then values, were
# expanded to, (batch, heads, repeats, sequence, size), and reshaped to. With alike = 1 only masks are broadcast, as
# around Einsums: keys have the leading axes of the queries, and values those of the scores with their masks.
_FUSED = Op(
    "Attention",
    1,
    domain="infera",
    infer=_infer,
    compute=plain(_compute),
    expand=_parts,
    kernels=Kinds(
        {
            **_jit.attention(_operands, _compiles, _shares_keys),
            "cpu": Kernel(bind=_bind, supports=_supported, strided=True),
        },
        "_triton_attention",
        lambda gpu: gpu.fused(_repeats),
    ),
    values=(6, 7, 8, 9),
    attrs={
        "scale": 1.0,
        "cap": 0.0,
        "fill": 0.0,
        "fill_where": 0,
        "guarded": 0,
        "swap_keys": 0,
        "repeated": 0,
        "heads_last": 0,
        "alike": 0,
    },
    cases=Cases(_cases),
)

OPS: tuple[Op, ...] = (_FUSED,)
