"""What Triton 3.6 makes of kernels otherwise than tests ask: for each test the difference, and why it is there.

Whoever runs tests with 3.6 has everything else held to the same as with newer releases, and a difference that is gone
fails its test.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import pytest

from infera_kernels.launch import Inspection

RELEASE = "3.6."


@dataclass(frozen=True, slots=True)
class Difference:
    """`spilled` are bytes a thread; `instead` maps instructions that tests count to those that are there in place of
    them; `occupancy` is the share of warps that fit beside each other, where that is less than tiles.json says."""

    reason: str = ""
    spilled: int = 0
    instead: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    occupancy: float | None = None


NONE = Difference()

_WIDE = Difference(
    "After the loop all sums of 128 x 256 come from tensor memory at once: what waits for them is spilled, once.",
    spilled=96,
)
_INTEGERS = Difference(
    "On sm_100 the compiler multiplies integers by instructions of one warp, from 64 rows on too.",
    instead=MappingProxyType({"UTCIMMA": "IMMA"}),
)


def _masks(spilled: int) -> Difference:
    return Difference("With a mask it takes more registers than leave room for as many blocks.", spilled=spilled)


def _saved(spilled: int) -> Difference:
    return Difference("The assembler saves registers for as many blocks as 3.9's, and spills a few.", spilled=spilled)


def _fewer(occupancy: float) -> Difference:
    return Difference("The compiler takes more registers than 3.9's, so that fewer blocks fit.", occupancy=occupancy)


_TILE = "test_tile_table.py::test_a_tile_compiles_to_what_the_table_says"
_SIZES = ("64x64x128 w4 s4", "128x64x128 w4 s4", "128x128x128 w8 s4")

KNOWN: Mapping[str, Difference] = MappingProxyType(
    {
        **{
            f"test_compile.py::test_matmul[sm_100-{case}]": _WIDE
            for case in ("float16-ieee-128x256x64_0", "float16-ieee-128x256x64_1", "bfloat16-ieee-128x256x64")
        },
        **{f"{_TILE}[sm_100 matmul half 128x256x64 w8 {stages}]": _WIDE for stages in ("s3", "s4")},
        **{
            f"{_TILE}[sm_100 {kind} int8 {size}]": _INTEGERS
            for kind in ("matmul", "quantized", "quantized+residual")
            for size in _SIZES
        },
        **{
            f"test_compile_quant.py::{case}]": _INTEGERS
            for case in (
                "test_integers_are_multiplied_on_tensor_cores[sm_100-64x64x128-int8",
                "test_integers_are_multiplied_on_tensor_cores[sm_100-128x128x128-uint8",
                "test_convolutions_of_channels_last[sm_100-128x128x128",
            )
        },
        **{
            f"test_compile_quantized.py::test_integers_go_in_and_come_out[sm_100-{kernel}-{tile}]": _INTEGERS
            for kernel in (1, 3)
            for tile in ("64x64x128", "128x128x128")
        },
        "test_compile_quantized.py::test_zero_points_of_borders[sm_100]": _INTEGERS,
        "test_compile_attention.py::test_masks[sm_86-float32]": _masks(8),
        "test_compile_attention.py::test_one_query_in_float32[sm_90-512]": _masks(16),
        "test_compile_attention.py::test_one_query_in_float32[sm_100-64]": _masks(8),
        "test_compile_attention.py::test_one_query_in_float32[sm_100-512]": _masks(8),
        f"{_TILE}[sm_80 conv ieee 16x32x32 w4 s3]": _fewer(0.438),
        f"{_TILE}[sm_86 conv ieee 64x64x16 w4 s3]": _fewer(0.25),
        f"{_TILE}[sm_90 matmul ieee 16x32x32 w4 s3]": _fewer(0.625),
        f"{_TILE}[sm_90 matmul ieee 32x32x32 w4 s3]": _fewer(0.5),
        f"{_TILE}[sm_90 quantized int8 16x32x128 w4 s4]": _fewer(0.625),
        f"{_TILE}[sm_90 quantized+residual int8 16x32x128 w4 s4]": _fewer(0.625),
        f"{_TILE}[sm_90 attention ieee d512 1x16 w8 s1]": _fewer(0.125),
        f"{_TILE}[sm_100 matmul ieee 16x32x32 w4 s3]": _fewer(0.562),
        f"{_TILE}[sm_100 quantized int8 16x32x128 w4 s4]": _fewer(0.625),
        f"{_TILE}[sm_100 quantized+residual int8 16x32x128 w4 s4]": _fewer(0.625),
        f"{_TILE}[sm_100 attention half d256 16x32 w4 s2]": _fewer(0.125),
        f"{_TILE}[sm_100 attention ieee d256 32x16 w8 s2]": _fewer(0.125),
        f"{_TILE}[sm_100 attention ieee d512 1x16 w8 s1]": _fewer(0.125),
        "test_compile_attention.py::test_a_step_of_few_tokens[sm_80-float32-64-{'members': 16}]": _saved(16),
        f"{_TILE}[sm_80 matvec half n 64x64 s3]": _fewer(0.312),
        f"{_TILE}[sm_80 matvec half k 8x128 s3]": _fewer(0.625),
        f"{_TILE}[sm_80 matvec half k 8x128 s5]": _fewer(0.625),
        f"{_TILE}[sm_80 matvec ieee k 4x1024 s1]": _fewer(0.375),
        f"{_TILE}[sm_80 decode ieee d64 16x32 w4 s3]": _saved(8),
        f"{_TILE}[sm_80 decode ieee d256 1x32 w8 s1]": _fewer(0.125),
        f"{_TILE}[sm_86 matvec half k 8x128 s3]": _fewer(0.833),
        f"{_TILE}[sm_86 decode ieee d64 1x64 w8 s1]": _fewer(0.333),
        f"{_TILE}[sm_86 decode ieee d256 1x32 w8 s1]": _fewer(0.167),
        f"{_TILE}[sm_90 matvec half n 16x128 s3]": _fewer(0.562),
        f"{_TILE}[sm_90 matvec half n 16x128 s5]": _fewer(0.562),
        f"{_TILE}[sm_90 matvec ieee n 32x64 s1]": _fewer(0.625),
        f"{_TILE}[sm_90 matvec half k 8x128 s3]": _fewer(0.625),
        f"{_TILE}[sm_90 matvec half k 8x128 s5]": _fewer(0.625),
        f"{_TILE}[sm_90 matvec ieee n 32x64 s3]": _fewer(0.5),
        f"{_TILE}[sm_90 matvec ieee n 64x32 s3]": _fewer(0.5),
        f"{_TILE}[sm_90 decode ieee d64 1x64 w8 s1]": _fewer(0.25),
        f"{_TILE}[sm_90 decode ieee d256 1x32 w8 s1]": _fewer(0.125),
        f"{_TILE}[sm_100 matvec half n 64x64 s5]": _fewer(0.25),
        f"{_TILE}[sm_100 matvec ieee n 16x128 s3]": _fewer(0.5),
        f"{_TILE}[sm_100 matvec ieee n 32x64 s3]": _fewer(0.438),
        f"{_TILE}[sm_100 matvec ieee n 64x32 s3]": _fewer(0.5),
        f"{_TILE}[sm_100 matvec ieee k 4x1024 s1]": _fewer(0.375),
        f"{_TILE}[sm_100 matvec ieee k 8x512 s1]": replace(_saved(8), occupancy=0.5),
        f"{_TILE}[sm_100 matvec half n 32x64 s3]": _fewer(0.562),
        f"{_TILE}[sm_100 matvec half n 64x32 s3]": _fewer(0.562),
        f"{_TILE}[sm_100 matvec half k 4x1024 s1]": _fewer(0.438),
        f"{_TILE}[sm_100 decode ieee d64 1x64 w8 s1]": _fewer(0.25),
        f"{_TILE}[sm_100 decode ieee d256 1x32 w8 s1]": _fewer(0.125),
        f"{_TILE}[sm_80 gated_row half k 8x256 s3]": _fewer(0.562),
        f"{_TILE}[sm_80 gated_row ieee n 16x128 s3]": _fewer(0.5),
        f"{_TILE}[sm_80 gated_row ieee k 8x512 s1]": _fewer(0.375),
        f"{_TILE}[sm_86 gated_row ieee n 16x256 s1]": _fewer(0.5),
        f"{_TILE}[sm_86 gated_row ieee n 32x128 s1]": _fewer(0.5),
        f"{_TILE}[sm_90 gated_row half n 32x128 s1]": _fewer(0.375),
        f"{_TILE}[sm_90 gated_row ieee n 16x256 s1]": _fewer(0.375),
        f"{_TILE}[sm_90 gated_row ieee n 32x128 s1]": _fewer(0.375),
        f"{_TILE}[sm_100 gated ieee 32x32x32 w4 s3]": _fewer(0.5),
        f"{_TILE}[sm_100 gated_row half n 32x128 s1]": _fewer(0.375),
        f"{_TILE}[sm_100 gated_row ieee n 64x64 s1]": _fewer(0.375),
        f"{_TILE}[sm_100 gated_row ieee k 8x512 s1]": _fewer(0.375),
    }
)
"""By the test's name, from its file on."""


def of(node: str, triton: str) -> Difference:
    """The one of a test, with a release of Triton; NONE where there is none."""
    return KNOWN.get(node.removeprefix("tests/kernels/"), NONE) if triton.startswith(RELEASE) else NONE


@contextmanager
def allowed(known: Difference) -> Iterator[None]:
    """Inspections are as if the difference were not there. Raises AssertionError where nothing has it."""
    seen = set[str]()
    usage, count = Inspection.spilled_bytes.fget, Inspection.count  # type: ignore[attr-defined]
    others = {**known.instead, **{there: asked for asked, there in known.instead.items()}}

    def spilled_bytes(self: Inspection) -> int:
        found = int(usage(self))
        if not known.spilled or found != known.spilled:
            return found
        seen.add("spills")
        return 0

    def counted(self: Inspection, instruction: str) -> int:
        found = count(self, others.get(instruction, instruction))
        if found and instruction in known.instead:
            seen.add(instruction)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Inspection, "spilled_bytes", property(spilled_bytes))
        patch.setattr(Inspection, "count", counted)
        yield
    gone = {*known.instead, *(["spills"] if known.spilled else [])} - seen
    assert not gone, f"Triton {RELEASE}x differs no longer in {', '.join(sorted(gone))}: {known.reason}"
