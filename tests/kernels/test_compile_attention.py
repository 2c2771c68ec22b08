"""Attention and what goes with it compiled for every architecture: tensor cores, asynchronous copies, no spills."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from infera_kernels.launch import CompileLauncher, Inspection
from infera_kernels.launch.devices import DEVICES
from tests.kernels.support import EVERY_ARCH, FakeArray, multiplication, tensor_cores

pytest.importorskip("triton")

from bench.tile_predictions import target_for
from infera_kernels.triton import attention, cache, decode_attention, rotary
from infera_kernels.triton.attention_tiles import MOST_SPLITS, TILES, WIDEST, pick_splits, pick_tile
from infera_kernels.triton.decode_attention import DECODE
from tests.kernels.fake_steps import step_of

pytestmark = pytest.mark.kernels


@pytest.fixture(params=EVERY_ARCH)
def launcher(request: pytest.FixtureRequest) -> CompileLauncher:
    return CompileLauncher(request.param)


def scratch(shape: Sequence[int], dtype: Any = "float32") -> FakeArray:
    return FakeArray(shape, dtype)


def attend(
    launcher: CompileLauncher,
    dtype: str,
    q: tuple[int, ...],
    k: tuple[int, ...],
    options: attention.Options,
    *masks: tuple[int, ...],
) -> list[Inspection]:
    x, keys, values, out = (FakeArray(shape, dtype) for shape in (q, k, k, q))
    given = [FakeArray(shape, dtype) for shape in masks]
    attention.attention(x, keys, values, out, launcher, scratch, options, masks=given)
    for result in launcher.compiled:
        assert result.spilled_bytes == 0
        assert result.binary.spec.shared_bytes <= launcher.target.shared_bytes
    return launcher.compiled


@pytest.mark.parametrize("size", [40, 128, 512])
def test_half_precision_runs_on_tensor_cores(size: int, launcher: CompileLauncher) -> None:
    heads = (8, 12, 512, size)
    (result,) = attend(launcher, "float16", heads, heads, attention.Options(right=0))
    wide = launcher.launches[0].constexprs["BM"] >= 64
    assert wide == (size <= 256)
    assert multiplication(launcher.target.arch, launcher.launches[0].constexprs["BM"]) in tensor_cores(result)
    assert result.count("LDGSTS") > 0
    assert result.count("LDG.E.128") > 0
    assert result.count("STG.E.128") > 0


@pytest.mark.parametrize("size", [64, 512])
def test_float32_stays_float32(size: int, launcher: CompileLauncher) -> None:
    heads = (8, 12, 512, size)
    (result,) = attend(launcher, "float32", heads, heads, attention.Options())
    assert not tensor_cores(result)
    assert result.count("FFMA") > 0
    assert result.count("LDGSTS") > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_masks(dtype: str, launcher: CompileLauncher) -> None:
    heads = (8, 12, 100, 64)
    attend(launcher, dtype, heads, heads, attention.Options(scale=0.1, right=0), (8, 1, 1, 100), (12, 100, 100))


def test_every_option(launcher: CompileLauncher) -> None:
    """Windows, caps, lengths, sinks and what is added to later keys, for heads that are rows and for others."""
    for m in (2, 100):
        q, k = FakeArray((2, 2, 4, m, 64), "float16"), FakeArray((2, 2, 1, 300, 64), "float16")
        seen, lengths = FakeArray((m, 300), "bool"), FakeArray((2, 1, 1, 1, 1), "int64")
        options = attention.Options(cap=5.0, hidden=True, left=9, right=0, ahead=-1e4, more=1, from_end=True)
        given = {"condition": seen, "lengths": lengths, "sink": FakeArray((2, 4, 1, 1), "float16")}
        attention.attention(q, k, k, q, launcher, scratch, options, **given)  # type: ignore[arg-type]
    assert [x.constexprs.get("PACKED") for x in launcher.launches] == [True, True, False]
    assert all(result.spilled_bytes == 0 for result in launcher.compiled)


@pytest.mark.parametrize("size", [64, 256, 512])
def test_one_query_in_float32(size: int, launcher: CompileLauncher) -> None:
    q, k = (2, 12, 1, size), (2, 12, 500, size)
    first, _ = attend(launcher, "float32", q, k, attention.Options(), (2, 1, 1, 500))
    assert launcher.launches[0].constexprs["BM"] == 1
    assert first.count("LDG.E.128") > 2


def test_a_step_against_many_keys_is_split(launcher: CompileLauncher) -> None:
    q, k = (1, 8, 4, 1, 128), (1, 8, 1, 4096, 128)
    first, second = attend(launcher, "float16", q, k, attention.Options(right=0, before=4095))
    assert launcher.launches[0].constexprs["SPLITS"] == 16
    assert launcher.launches[0].grid == (8 * 16, 1, 1)
    assert launcher.launches[1].grid == (32, 1, 1)
    assert first.count("LDGSTS") > 0
    assert second.count("LDG.E") > 0


def decoded(launcher: CompileLauncher, step: decode_attention.Step) -> Inspection:
    """What the first kernel of a step becomes; none spills."""
    decode_attention.decode(step, launcher, scratch)
    assert not any(result.spilled_bytes for result in launcher.compiled)
    return launcher.compiled[0]


STEPS: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("float16", 64, {}),
    ("float16", 80, {"interleaved": True, "new": 3, "width": 40}),
    ("bfloat16", 128, {"batch": 64, "places": True}),
    ("float16", 64, {"uneven": False, "members": 1, "width": 0, "values": 128}),
    ("float16", 256, {"members": 2, "new": 8, "causal": False}),
    ("float32", 64, {"members": 16}),
    ("float32", 128, {"interleaved": True}),
)


@pytest.mark.parametrize(("dtype", "size", "how"), STEPS, ids=str)
def test_a_step_of_few_tokens(dtype: str, size: int, how: dict[str, Any], launcher: CompileLauncher) -> None:
    """The past is on its way to shared memory while other blocks are computed, and leaves in words of 16 bytes."""
    first = decoded(launcher, step_of(dtype, size, 8191, **how))
    assert len(launcher.compiled) == 1 + (how.get("batch") != 64)
    assert first.binary.spec.shared_bytes <= launcher.target.shared_bytes
    assert first.count("LDGSTS") > 0
    assert first.count("STG.E.128") > 0
    assert bool(tensor_cores(first)) == (dtype != "float32")


@pytest.mark.parametrize("size", [64, 128, 256])
def test_a_step_of_one_query_in_float32(size: int, launcher: CompileLauncher) -> None:
    first = decoded(launcher, step_of("float32", size, 511, members=1))
    assert launcher.launches[0].constexprs["BM"] == 1
    assert first.count("LDG.E.128") > 8
    assert first.count("STG.E.128") > 8


def test_a_step_without_a_past(launcher: CompileLauncher) -> None:
    for uneven in (False, True):
        decoded(launcher, step_of("float16", 64, 0, uneven=uneven, new=4))
    assert len(launcher.compiled) == 2


@pytest.mark.parametrize(
    ("sequences", "keys", "parts"), [(1, 512, 8), (1, 256, 1), (64, 2048, 1), (1, 64, 1), (1, 8192, 16)]
)
def test_keys_are_split_where_that_pays_for_another_launch(sequences: int, keys: int, parts: int) -> None:
    sizes = {"rows": 4, "matrices": 8 * sequences, "keys": keys, "size": 64}
    target = target_for(DEVICES[0])
    cut = DECODE.predict(DECODE.problem("half", sizes), target)
    assert cut.splits == parts
    assert cut in DECODE.candidates(DECODE.problem("half", sizes), target)


def test_tiles_grow_from_small_to_large() -> None:
    for families in TILES.values():
        assert max(families) == WIDEST
        for tiles in families.values():
            assert [t.rows for t in tiles] == sorted({t.rows for t in tiles})


def test_tiles_grow_with_the_work() -> None:
    assert pick_tile("half", 64, 1, 1024, 12).rows == 16
    assert pick_tile("half", 64, 512, 512, 8 * 12).rows in (64, 128)
    assert pick_tile("ieee", 64, 1, 1024, 12).rows == 1
    assert pick_tile("ieee", 64, 16, 1024, 1000).rows == 16
    assert pick_tile("half", 64, 64, 8192, 8).rows == 64
    tile = TILES["half"][64][0]
    assert pick_splits(tile, 1, 100, 1) == 1
    assert pick_splits(tile, 1, 100_000, 1) == MOST_SPLITS
    assert pick_splits(tile, 1, 100_000, 40) == 3
    assert pick_splits(tile, 1, 100_000, 1000) == 1


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary(interleaved: bool, launcher: CompileLauncher) -> None:
    x, table, places = (
        FakeArray((2, 12, 100, 80), "float16"),
        FakeArray((512, 40), "float16"),
        FakeArray((100,), "int64"),
    )
    rotary.rotary(x, table, table, FakeArray(x.shape, "float16"), launcher, interleaved=interleaved, places=places)
    (result,) = launcher.compiled
    assert result.spilled_bytes == 0
    assert result.count("LDG.E.128") > 0
    assert result.count("STG.E.128") > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_append(dtype: str, launcher: CompileLauncher) -> None:
    past, new, out = (FakeArray((2, 8, n, 80), dtype) for n in (100, 1, 128))
    lengths: Any = FakeArray((2, 1, 1, 1), "int32")
    cache.append(past, new, out, launcher, lengths=lengths)
    (result,) = launcher.compiled
    assert result.spilled_bytes == 0
    assert result.count("LDG.E.128") > 1
    assert result.count("STG.E.128") > 0
