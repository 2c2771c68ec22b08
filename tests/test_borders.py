"""Values that lie within the border that convolutions read around them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

import infera_gpu
from infera_gpu import slots
from infera_gpu.graph import HostArray
from infera_gpu.plan import Plan, Step
from tests.text import parse

Shape = tuple[int, ...]


def numbers(*shape: int, seed: int = 0) -> HostArray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def weights(**shapes: Shape) -> str:
    """Initialisers of these names and shapes, in ONNX's text syntax."""
    return ", ".join(
        f"float[{', '.join(map(str, shape))}] {name} = {{{', '.join(f'{v:.4f}' for v in numbers(*shape).reshape(-1))}}}"
        for name, shape in shapes.items()
    )


def bordered(plan: Plan) -> list[Step]:
    """The steps whose input 0 has a border."""
    return [
        s for s in plan.steps
        if s.placed and s.ins and s.ins[0] is not None and s.ins[0].shape != s.placed.site.spec(0).dims
    ]  # fmt: skip


def ran(text: str, feeds: Mapping[str, HostArray], threads: int = 1) -> tuple[Plan, dict[str, HostArray]]:
    """The plan, and what a run gives in an arena that another session has filled with NaN."""
    arena = infera_gpu.Arena()
    with infera_gpu.load(parse(text), device="cpu", threads=threads, jit=False, arena=arena) as session:
        session.run({name: x + 1 for name, x in feeds.items()})
        plan = session.plan_for(feeds)
        size = plan.arena_bytes // 4
        fill = parse("f (float[N] x) => (float[N] z) { a = Neg(x) b = Exp(x) c = Add(a, b) z = Mul(c, x) }")
        with infera_gpu.load(fill, device="cpu", threads=1, arena=arena) as other:
            other.run({"x": np.full(size, np.nan, np.float32)})
        return plan, session.run(feeds)


def check(
    text: str, feeds: Mapping[str, HostArray], count: int, monkeypatch: pytest.MonkeyPatch, threads: int = 1
) -> Plan:
    """So many values have a border, and results are to the last bit those without; returns the plan."""
    plan, got = ran(text, feeds, threads)
    assert plan.bordered == count
    assert (f"values within the border that their readers want: {count}" in str(plan)) == (count > 0)
    with monkeypatch.context() as patch:
        patch.setattr(slots._Slots, "surround", lambda *_: None)
        without, want = ran(text, feeds, threads)
    assert without.bordered == 0
    assert not bordered(without)
    for name, array in want.items():
        assert np.isfinite(array).all()
        np.testing.assert_array_equal(got[name], array)
    return plan


CHAIN = """
g (float[{n}, 9, 11, 4] x) => (float[{n}, H, W, 4] y) <{weights}> {{
    r = infera.FusedConvNHWC <activation = "relu"> (x, v, b)
    c = infera.FusedConvNHWC <pads = [1, 1, 1, 1]{group}> (r, w)
    y = infera.FusedConvNHWC (c, u)
}}"""


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(
    ("filters", "group"),
    [((12, 12, 3, 3), ""), ((12, 12, 3, 2), ""), ((12, 1, 3, 3), ", group = 12")],
    ids=["winograd", "columns", "depthwise"],
)
def test_an_activated_convolution_writes_within_the_border_of_the_next(
    filters: Shape, group: str, n: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = weights(v=(12, 4, 1, 1), b=(12,), w=filters, u=(4, 12, 1, 1))
    text = CHAIN.format(n=n, weights=given, group=group)
    (reader,) = bordered(check(text, {"x": numbers(n, 9, 11, 4)}, 1, monkeypatch, threads))
    assert reader.ins[0] is not None
    assert reader.ins[0].is_contiguous


def test_tiles_of_winograd_see_a_wider_border(monkeypatch: pytest.MonkeyPatch) -> None:
    """F(4x4) makes 17 x 18 outputs of 5 x 5 tiles, which see 22 x 22 values."""
    text = f"""
    g (float[1, 17, 18, 4] x) => (float[1, 17, 18, 8] y) <{weights(v=(8, 4, 1, 1), w=(8, 8, 3, 3))}> {{
        r = infera.FusedConvNHWC <activation = "relu"> (x, v)
        y = infera.FusedConvNHWC <pads = [1, 1, 1, 1]> (r, w)
    }}"""
    (reader,) = bordered(check(text, {"x": numbers(1, 17, 18, 4)}, 1, monkeypatch))
    assert reader.ins[0] is not None
    assert reader.ins[0].shape == (1, 22, 22, 8)


def test_a_copy_that_is_needed_anyway_leaves_room_for_the_border(monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"""
    g (float[2, 5, 10, 8] x) => (float[2, 5, 4, 8] y) <{weights(w=(8, 5, 3, 3))}> {{
        t = Transpose <perm = [0, 2, 3, 1]> (x)
        y = infera.FusedConvNHWC <pads = [1, 1, 1, 1], strides = [2, 2]> (t, w)
    }}"""
    plan = check(text, {"x": numbers(2, 5, 10, 8)}, 1, monkeypatch)
    assert plan.steps[0].kind == "copy"
    assert not plan.steps[0].outs[0].is_contiguous


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("attributes", ["pads = [1, 1, 1, 1], strides = [2, 2]", "dilations = [2, 1]"])
def test_few_channels_that_come_first_are_read_as_they_lie(
    attributes: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"""
    g (float[2, 3, 10, 8] x) => (float[N, H, W, C] y) <{weights(w=(8, 3, 3, 3), b=(8,))}> {{
        t = Transpose <perm = [0, 2, 3, 1]> (x)
        y = infera.FusedConvNHWC <{attributes}, activation = "relu"> (t, w, b)
    }}"""
    feeds = {"x": numbers(2, 3, 10, 8)}
    plan, got = ran(text, feeds, threads)
    assert [step.kind for step in plan.steps] == ["kernel"]
    monkeypatch.setattr("infera_kernels.cpu.nhwc_conv.FEW_INPUTS", 2)
    copied, want = ran(text, feeds, threads)
    assert [step.kind for step in copied.steps] == ["copy", "kernel"]
    np.testing.assert_array_equal(got["y"], want["y"])


def test_all_who_read_a_value_see_the_same_border(monkeypatch: pytest.MonkeyPatch) -> None:
    text = """
    g (float[1, 9, 11, 4] x) => (float[1, H, W, 8] y, float[1, 9, 11, 8] z) <{}> {{
        r = infera.FusedConvNHWC <activation = "relu"> (x, v)
        y = infera.FusedConvNHWC <pads = {}, strides = [1, 2]> (r, w)
        z = infera.FusedConvNHWC <pads = [1, 1, 1, 1], strides = [2, 1]> (r, w)
    }}"""
    given, feeds = weights(v=(8, 4, 1, 1), w=(8, 8, 3, 3)), {"x": numbers(1, 9, 11, 4)}
    assert len(bordered(check(text.format(given, [1, 1, 1, 1]), feeds, 1, monkeypatch))) == 2
    for pads in ([2, 1, 1, 1], [0, 0, 0, 0]):
        check(text.format(given, pads), feeds, 0, monkeypatch)


@pytest.mark.parametrize("reader", ["y = Exp(r)", "y = infera.FusedConvNHWC (r, u)", "y = Identity(r)"])
def test_who_reads_no_border_keeps_it_away(reader: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows with gaps would cost them more than the copy; what is an output lies as the caller gets it."""
    text = f"""
    g (float[1, 9, 11, 4] x) => (float[1, 9, 11, 8] y, float[1, 9, 11, 8] z) <{
        weights(v=(8, 4, 1, 1), w=(8, 8, 3, 3), u=(8, 8, 1, 1))
    }> {{
        r = infera.FusedConvNHWC <activation = "relu"> (x, v)
        {reader}
        z = infera.FusedConvNHWC <pads = [1, 1, 1, 1]> (r, w)
    }}"""
    check(text, {"x": numbers(1, 9, 11, 4)}, 0, monkeypatch)


def test_a_bias_alone_makes_no_pass_to_another_place(monkeypatch: pytest.MonkeyPatch) -> None:
    text = CHAIN.replace('<activation = "relu"> ', "")
    given = weights(v=(12, 4, 1, 1), b=(12,), w=(12, 12, 3, 3), u=(4, 12, 1, 1))
    check(text.format(n=1, weights=given, group=""), {"x": numbers(1, 9, 11, 4)}, 0, monkeypatch)


def test_a_value_without_gaps_is_read_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The border of one line of pixels lies before and after it: any kernel writes there, and reads it there."""
    text = f"""
    g (float[1, 20, 4] x) => (float[1, 20, 8] y, float[1, 20, 8] z) <{
        weights(v=(8, 4, 1), w=(8, 8, 5), u=(8, 8, 1))
    }> {{
        r = infera.FusedConvNHWC (x, v)
        y = infera.FusedConvNHWC (r, u)
        z = infera.FusedConvNHWC <pads = [2, 2]> (r, w)
    }}"""
    assert len(bordered(check(text, {"x": numbers(1, 20, 4)}, 1, monkeypatch))) == 1


def test_a_value_that_could_not_be_written_within_its_border_is_read_where_it_lies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A Reshape passes the place on to what it reads, but a Transpose does not: the Reshape copies."""
    text = f"""
    g (float[1, 4, 20] x) => (float[1, 10, 8] y, float[1, 10, 8] z) <{weights(w=(8, 8, 5), u=(8, 8, 1))},
        int64[3] shape = {{1, 10, 8}}> {{
        t = Transpose <perm = [0, 2, 1]> (x)
        r = Reshape(t, shape)
        y = infera.FusedConvNHWC (r, u)
        z = infera.FusedConvNHWC <pads = [2, 2]> (r, w)
    }}"""
    check(text, {"x": numbers(1, 4, 20)}, 0, monkeypatch)


def test_a_residual_is_read_without_a_border(monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"""
    g (float[1, 9, 11, 8] x) => (float[1, 9, 11, 8] y) <{weights(v=(8, 8, 1, 1), b=(8,), w=(8, 8, 3, 3))}> {{
        r = infera.FusedConvNHWC <activation = "relu"> (x, v)
        y = infera.FusedConvNHWC <pads = [1, 1, 1, 1]> (r, w, b, r)
    }}"""
    check(text, {"x": numbers(1, 9, 11, 8)}, 0, monkeypatch)


@pytest.mark.parametrize("channels", [16, 72])
@pytest.mark.parametrize("pads", [(1, 1, 1, 1), (0, 1, 2, 1)])
def test_a_residual_of_a_convolution_that_reads_another_value_within_a_border(
    channels: int, pads: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both values could have the same border; only one of those who read the first would see it."""
    shapes = weights(w=(channels, 4, 3, 3), u=(channels, channels, 3, 3), v=(channels, channels, 3, 3))
    text = f"""f (float[1, 4, 9, 11] x) => (float[1, {channels}, 9, 11] z) <{shapes}> {{
        a = Conv <pads = [1, 1, 1, 1]> (x, w) b = Relu(a)
        c = Conv <pads = {list(pads)}> (b, u) d = Relu(c)
        e = Conv <pads = {list(pads)}> (d, v) r = Add(e, b) z = Relu(r)
    }}"""
    check(text, {"x": numbers(1, 4, 9, 11)}, 1, monkeypatch)


def test_a_joined_value_has_a_border(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that are rows of the image are written to their places as well; channels are joined by copying."""
    text = """
    g (float[1, 6, 11, 4] x) => (float[1, H, 11, 8] y) <{}> {{
        r = infera.FusedConvNHWC <activation = "relu"> (x, v)
        s = infera.FusedConvNHWC <activation = "relu"> (x, k)
        j = Concat <axis = {}> (r, s)
        y = infera.FusedConvNHWC <pads = [1, 1, 1, 1]> (j, w)
    }}"""
    for axis, inputs in ((3, 16), (1, 8)):
        given = weights(v=(8, 4, 1, 1), k=(8, 4, 1, 1), w=(8, inputs, 3, 3))
        plan = check(text.format(given, axis), {"x": numbers(1, 6, 11, 4)}, 1, monkeypatch)
        assert any(s.label.startswith("Concat") for s in plan.steps) == (axis == 3)


def test_what_works_in_place_does_so_within_the_border(monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"""
    g (float[2, 9, 11, 4] x) => (float[2, 9, 11, 8] y) <{weights(v=(8, 4, 1, 1), w=(8, 8, 3, 3))}> {{
        a = infera.FusedConvNHWC <activation = "relu"> (x, v)
        r = Sin(a)
        y = infera.FusedConvNHWC <pads = [1, 1, 1, 1]> (r, w)
    }}"""
    plan = check(text, {"x": numbers(2, 9, 11, 4)}, 1, monkeypatch)
    assert plan.steps[0].outs == plan.steps[1].outs


def test_large_values_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    text = CHAIN.format(n=1, weights=weights(v=(12, 4, 1, 1), b=(12,), w=(12, 12, 3, 3), u=(4, 12, 1, 1)), group="")
    feeds = {"x": numbers(1, 9, 11, 4)}
    for size, count in ((9 * 11 * 12 * 4, 1), (9 * 11 * 12 * 4 - 1, 0)):
        monkeypatch.setattr(slots, "LARGE", size)
        assert ran(text, feeds)[0].bordered == count
