"""Memory of what lasts: in blocks of large pages, which go back with the last array in them."""

from __future__ import annotations

import gc
import weakref
from itertools import pairwise

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import infera_gpu
from infera_gpu.devices.base import ON_LARGE_PAGES, host_block
from infera_kernels.calls import Array
from infera_kernels.cpu import aligned, packed
from infera_kernels.cpu.aligned import LARGE_PAGE, LINE, SLAB_LEAST, SLAB_MOST, Slabs, address, within


def test_arrays_lie_behind_each_other_in_a_slab_and_do_not_overlap() -> None:
    slabs = Slabs()
    with within(slabs):
        made = [aligned.aligned((SLAB_LEAST // 4 + i,), np.float32, slack=5) for i in range(7)]
    assert address(made[0]) % LARGE_PAGE == 0
    for before, after in pairwise(made):
        assert address(after) % LINE == 0
        assert 0 <= address(after) - (address(before) + before.nbytes + 5) < LINE
    for i, array in enumerate(made):
        array[:] = i
    assert [float(a.min()) for a in made] == [float(a.max()) for a in made] == list(range(7))


def test_small_arrays_and_those_of_other_threads_have_memory_of_their_own() -> None:
    slabs = Slabs()
    with within(slabs):
        small = aligned.aligned((SLAB_LEAST // 4 - 1,))
        with within(None):
            apart = aligned.aligned((SLAB_LEAST,))
        inside = aligned.aligned((SLAB_LEAST,))
    outside = aligned.aligned((SLAB_LEAST,))
    slab = slabs.take(1).base
    assert np.shares_memory(inside, slab)
    assert not any(np.shares_memory(a, slab) for a in (small, apart, outside))


def test_many_small_arrays_share_a_slab() -> None:
    """A few of them are not worth a large page."""
    slabs = Slabs()
    with within(slabs):
        small = [aligned.aligned((SLAB_LEAST // 16,), np.uint8) for _ in range(40)]
    slab = slabs.take(1).base
    assert [np.shares_memory(a, slab) for a in small] == [False] * 15 + [True] * 25
    for i, array in enumerate(small):
        array[:] = i
    assert [int(a.max()) for a in small] == list(range(40))


def test_a_large_arena_begins_and_ends_with_a_large_page() -> None:
    block = host_block(ON_LARGE_PAGES + 1)
    assert address(block) % LARGE_PAGE == 0
    whole = block.base
    assert whole is not None
    end = address(whole) + whole.nbytes
    assert end - (address(block) + block.nbytes) >= -(address(block) + block.nbytes) % LARGE_PAGE
    assert block.nbytes == ON_LARGE_PAGES + 1


def test_slabs_go_with_their_arrays() -> None:
    slabs = Slabs()
    with within(slabs):
        first = aligned.aligned((SLAB_MOST,), np.uint8)
        gone = weakref.ref(first.base)
        while (last := aligned.aligned((SLAB_MOST,), np.uint8)).base is first.base:
            pass
        large = aligned.aligned((SLAB_MOST + 1,), np.uint8)
    assert not np.shares_memory(large, last.base)
    del first
    gc.collect()
    assert gone() is None
    del slabs
    last[-1] = 1
    assert last[-1] == 1


def test_where_addresses_are_scarce_an_array_has_a_place_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aligned, "SLAB_BYTES", 1 << 62)
    with within(Slabs()):
        array = aligned.aligned((SLAB_LEAST,), np.uint8)
    array[-1] = 1
    assert address(array) % LINE == 0


@pytest.mark.skipif(packed.inner() is None, reason="NumPy calls a BLAS whose inner loops are not known")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_session_packs_into_slabs_that_go_with_it(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    slabs: list[weakref.ref[Array]] = []
    take = Slabs.take

    def noted(self: Slabs, nbytes: int) -> Array:
        found = take(self, nbytes)
        slabs.append(weakref.ref(found.base))
        return found

    monkeypatch.setattr(Slabs, "take", noted)
    weights = {f"w{i}": np.linspace(-1, 1 + i, 512 * 512, dtype=np.float32).reshape(512, 512) for i in range(2)}
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "w1"], ["y"]),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [64, 512]) for name in "xy"]
    constants = [numpy_helper.from_array(w, name) for name, w in weights.items()]
    graph = helper.make_graph(nodes, "two", values[:1], values[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    session = infera_gpu.load(model, device="cpu", threads=threads, jit=False)
    x = np.linspace(0, 1, 64 * 512, dtype=np.float32).reshape(64, 512)
    want = np.maximum(x.astype(np.float64) @ weights["w0"], 0) @ weights["w1"]
    np.testing.assert_allclose(session.run({"x": x})["y"], want, atol=2e-5 * np.abs(want).max())
    assert len(slabs) == 2
    assert slabs[0]() is slabs[1]() is not None
    session.close()
    gc.collect()
    assert slabs[0]() is None
