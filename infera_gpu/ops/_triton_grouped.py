"""The "triton" kernel of onnxruntime's GroupQueryAttention. Declares no operators itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from infera_gpu.memory import aligned
from infera_gpu.op import Buffers, Call, Op, Site
from infera_gpu.ops._triton import kernels
from infera_gpu.ops._triton_attention import Arranged, apart, covers, launches, room, stand_in, step_room
from infera_gpu.spec import Array, TensorSpec

if TYPE_CHECKING:
    from infera_kernels.triton.decode_attention import Step


@dataclass(frozen=True)
class _Grouped:
    """New heads, (batch, heads, new, size), the caches that come out, and the attention over those."""

    new: tuple[Array, Array, Array]
    past: tuple[Array, Array] | None
    presents: Sequence[Array]
    lengths: Array
    shift: int | None
    """From the last key's index to the index of the first new one; None where all rows begin with new ones."""
    attention: Arranged

    @property
    def appended(self) -> list[dict[str, Any]]:
        """What the caches are made of."""
        pairs = zip(self.past or (None, None), self.new[1:], self.presents, strict=False)
        lengths = None if self.shift is None else self.lengths[..., 0]
        return [{"past": p, "new": n, "out": o, "lengths": lengths} for p, n, o in pairs]


def _total(site: Site) -> int:
    """Keys of the longest row."""
    found = site.ints(6)
    assert found is not None
    return found[0]


def _split(x: Array, *heads: int) -> list[Array]:
    """(batch, sequence, heads x size) as (batch, heads, sequence, size), part by part."""
    parts = x.reshape(*x.shape[:2], sum(heads), -1).swapaxes(1, 2)
    ends = np.cumsum(heads)
    return [parts[:, end - n : end] for end, n in zip(ends.tolist(), heads, strict=True)]


def _arrange(site: Site, ins: Sequence[Any], outs: Sequence[Any], turned: Sequence[Any] = ()) -> _Grouped | None:
    """No norms of heads, no scores wanted, no sink of zero; caches come out unless there are new keys alone.

    `turned` are queries and keys after rotation.
    """
    from infera_kernels.triton.attention import Options

    attrs = site.attrs
    heads, groups, total = int(attrs["num_heads"]), int(attrs["kv_num_heads"]), _total(site)
    presents = outs[1:3] if len(site.node.outputs) > 2 else []
    if any(site.node.outputs[3:]) or any(site.has(i) for i in (14, 15)):
        return None
    if attrs["smooth_softmax"] == 1 and not site.has(11):
        return None
    if site.has(1):
        q, k, v = (_split(x, n)[0] for x, n in zip(ins[:3], (heads, groups, groups), strict=True))
    else:
        q, k, v = _split(ins[0], heads, groups, groups)
    if turned:
        q, k = turned
    length, size, repeats = q.shape[2], q.shape[3], heads // groups
    past = (ins[3], ins[4]) if site.has(3) else None
    if not presents and (site.has(3) or length != total):
        return None
    keys, values = (x[:, :, :total] for x in presents) if presents else (k, v)
    lengths = ins[5].reshape(-1, 1, 1, 1, 1)
    window = int(attrs["local_window_size"])
    options = Options(
        scale=float(attrs["scale"] or size**-0.5),
        cap=float(attrs["softcap"] or 0.0),
        zero="unseen",
        left=window - 1 if window > 0 else None,
        right=0 if attrs["causal"] else None,
        more=1,
        from_end=length != total,
    )
    bias = [apart(ins[10][..., :total], heads, repeats)] if site.has(10) else []
    sink = ins[11].reshape(groups, repeats, 1, 1) if site.has(11) else None
    out = _split(outs[0], heads)[0]
    q4, o4 = apart(q, heads, repeats), apart(out, heads, repeats)
    attention = Arranged(q4, keys[:, :, None], values[:, :, None], o4, options, bias, None, lengths, sink)
    return _Grouped((q, k, v), past, presents, lengths, None if length == total else 1 - length, attention)


def _turned_specs(site: Site) -> tuple[TensorSpec, ...]:
    """Queries and keys after rotation, in scratch; none without it."""
    if not site.attrs["do_rotary"]:
        return ()
    batch, length, _ = site.spec(0).dims
    heads, groups = int(site.attrs["num_heads"]), int(site.attrs["kv_num_heads"])
    size = site.outs[0].dims[2] // heads
    return tuple(TensorSpec((batch, n, length, size), site.spec(0).dtype) for n in (heads, groups))


def _rotations(site: Site, given: _Grouped, ins: Sequence[Any], turned: Sequence[Array]) -> list[dict[str, Any]]:
    """What turns queries and keys: at positions that are given, or that follow those before."""
    cos, sin, at = ins[7], ins[8], ins[9] if site.has(9) else None
    width, calls = 2 * cos.shape[1], []
    for x, out in zip(given.new, turned, strict=False):
        how: dict[str, Any] = {"x": x[..., :width], "out": out[..., :width], "cos": cos, "sin": sin}
        if at is not None:
            how["places"] = at.reshape(x.shape[0], 1, -1)
        elif given.shift is None:
            how |= {"cos": cos[: x.shape[2]], "sin": sin[: x.shape[2]]}
        else:
            how |= {"places": given.lengths[:, 0, 0], "shift": given.shift, "along": 2}
        calls.append(how)
    return calls


def _step(site: Site, given: _Grouped, ins: Sequence[Any]) -> Step | None:
    """Few new tokens whose caches come out, as one kernel takes them; None where it does not."""
    from infera_kernels.triton.decode_attention import Step, supports_decode

    attention = given.attention
    options = attention.options
    if not given.presents or attention.masks or attention.sink is not None or options.cap or options.left is not None:
        return None
    turning: dict[str, Any] = {}
    if site.attrs["do_rotary"]:
        turning = {"cos": ins[7], "sin": ins[8], "interleaved": bool(site.attrs["rotary_interleaved"])}
        turning["places"] = ins[9] if site.has(9) else None
    _, k, v = given.new
    step = Step(
        attention.q,
        k,
        v,
        attention.out,
        None if given.shift is None else given.past,
        (given.presents[0], given.presents[1]),
        keys=_total(site),
        before=0 if given.shift is None else None,
        lengths=given.lengths.reshape(-1),
        causal=options.right is not None,
        scale=options.scale,
        **turning,
    )
    return step if supports_decode(step) else None


def _supports(site: Site) -> bool:
    from infera_kernels.triton.cache import supports_append
    from infera_kernels.triton.rotary import supports_rotary

    ins, outs = ([*map(stand_in, specs)] for specs in (site.ins, site.outs))
    given = _arrange(site, ins, outs)
    if given is not None and _step(site, given, ins) is not None:
        return True
    if given is None or not covers(given.attention) or not all(supports_append(**how) for how in given.appended):
        return False
    turned = [stand_in(spec) for spec in _turned_specs(site)]
    rotations = _rotations(site, given, ins, turned) if turned else []
    return all(supports_rotary(h["x"], h["cos"], h["sin"], h["out"], h.get("places")) for h in rotations)


def _bind(site: Site, io: Buffers) -> list[Call]:
    from infera_kernels.triton import cache, decode_attention, elementwise, rotary

    calls: list[Call] = []
    given = _arrange(site, io.ins, io.outs)
    assert given is not None
    if step := _step(site, given, io.ins):
        how: dict[str, Any] = {"invariant": site.batch_invariant, "tuned": site.tuned}
        return decode_attention.decode(step, io.launcher, io.scratch, **how)
    turned = [io.scratch(spec.dims, spec.dtype) for spec in _turned_specs(site)]
    if turned:
        interleaved = bool(site.attrs["rotary_interleaved"])
        for x, out, how in zip(given.new, turned, _rotations(site, given, io.ins, turned), strict=False):
            calls += rotary.rotary(**how, launcher=io.launcher, interleaved=interleaved)
            width = how["x"].shape[3]
            calls += elementwise.copy(x[..., width:], out[..., width:], io.launcher)
        given = _arrange(site, io.ins, io.outs, turned)
        assert given is not None
    for how in given.appended:
        calls += cache.append(**how, launcher=io.launcher, shift=given.shift or 0)
    return [*calls, *launches(given.attention, io, site)]


def _workspace(site: Site) -> int:
    ins = [*map(stand_in, site.ins)]
    given = _arrange(site, ins, [*map(stand_in, site.outs)])
    assert given is not None
    if step := _step(site, given, ins):
        return step_room(step, site)
    turned = sum(aligned(spec.nbytes) for spec in _turned_specs(site))
    return turned + room(given.attention, site)


def _shares(site: Site) -> tuple[tuple[int, int], ...]:
    """The caches that come out, where one kernel writes the new tokens, with those that go in."""
    ins = [*map(stand_in, site.ins)]
    given = _arrange(site, ins, [*map(stand_in, site.outs)])
    return () if given is None or given.past is None or _step(site, given, ins) is None else ((1, 3), (2, 4))


GROUPED = kernels(_bind, _supports, inplace=(), strided=True, workspace=_workspace, shares=_shares)

OPS: tuple[Op, ...] = ()
