"""Rows of unequal length share batches where that is proven, or declared, to change nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from infera_gpu.spec import Dim
from infera_server.scheduling.batching import derive
from infera_server.scheduling.padding import Lengthened, lengthened, widens, with_padding
from infera_server.scheduling.rows import Arrays, Gatherer, Layout, Padding, PadRule, padded_length, split
from tests.server.support import FakeSession, serving, spec, until


def attention(outputs: Any, fn: Callable[[Any, Any], dict[str, Any]]) -> FakeSession:
    """ids [N, S] and attention_mask [N, S] -> what `fn` makes of them."""
    inputs = {"ids": spec("N", "S", dtype=np.int64), "attention_mask": spec("N", "S", dtype=np.int64)}
    return FakeSession(inputs, outputs, lambda feeds: fn(feeds["ids"].astype(np.float32), feeds["attention_mask"]))


def pooled() -> FakeSession:
    """The mean of the positions that count, and every position beside it."""

    def fn(ids: Any, mask: Any) -> dict[str, Any]:
        mean = (ids * mask).sum(1, keepdims=True) / mask.sum(1, keepdims=True)
        return {"mean": mean.astype(np.float32), "each": (ids + mean).astype(np.float32)}

    return attention({"mean": spec("N", 1), "each": spec("N", "S")}, fn)


def layout_of(session: FakeSession, rule: PadRule | None = None) -> tuple[Layout, str]:
    found = with_padding(session, derive(session, 8), rule)
    assert found.layout is not None
    return found.layout, found.padding


@pytest.mark.parametrize(
    ("length", "padded"), [(1, 8), (8, 8), (9, 16), (33, 40), (64, 64), (65, 80), (128, 128), (129, 160), (512, 512)]
)
def test_lengths(length: int, padded: int) -> None:
    assert padded_length(length) == padded


def test_little_is_wasted_and_few_lengths_are_left() -> None:
    lengths = {padded_length(n) for n in range(1, 513)}
    assert len(lengths) == 20
    assert all(padded_length(n) < 1.25 * n for n in range(64, 4096))


def test_a_mask_that_is_heeded_is_found_and_proven() -> None:
    layout, why = layout_of(pooled())
    assert why == "on: 'S' is the length of mask 'attention_mask', and padded rows equal the rows as they are"
    assert layout.padding is not None
    assert layout.padding.inputs == {"ids": 1, "attention_mask": 1}
    assert layout.padding.outputs == {"each": 1}


def test_a_mask_that_is_not_heeded_is_found_out() -> None:
    session = attention({"mean": spec("N", 1)}, lambda ids, mask: {"mean": ids.mean(1, keepdims=True)})
    layout, why = layout_of(session)
    assert layout.padding is None
    assert "but output 'mean' differs between padded rows and rows as they are" in why


@pytest.mark.parametrize("symbols", [("S", "T"), (None, None)])
def test_inputs_of_other_symbols_are_as_long_as_the_mask(symbols: tuple[Dim, Dim]) -> None:
    session = pooled()
    session.inputs = {
        name: spec("N", symbol, dtype=np.int64) for name, symbol in zip(session.inputs, symbols, strict=True)
    }
    layout, why = layout_of(session)
    assert why.startswith("on: ids, attention_mask are as long as mask 'attention_mask'")
    assert layout.padding is not None
    assert layout.padding.inputs == {"ids": 1, "attention_mask": 1}


def test_outputs_of_other_lengths_are_refused() -> None:
    def fn(ids: Any, mask: Any) -> dict[str, Any]:
        return {"pairs": (ids * mask)[:, :-1] + ids[:, 1:]}

    layout, why = layout_of(attention({"pairs": spec("N", "P")}, fn))
    assert layout.padding is None
    assert "output 'pairs' is [1, 8] for a row of length 9" in why


def test_without_a_mask_nothing_is_tried() -> None:
    session = FakeSession({"x": spec("N", "S")}, {"y": spec("N", "S")}, lambda feeds: {"y": feeds["x"] * 2})
    layout, why = layout_of(session)
    assert (layout.padding, why) == (None, "")


def test_what_is_declared_is_done_and_said_to_change_results() -> None:
    session = FakeSession(
        {"x": spec("N", "S")}, {"y": spec("N", 1)}, lambda feeds: {"y": feeds["x"].mean(1, keepdims=True)}
    )
    layout, why = layout_of(session, PadRule("S", value=-1.0))
    assert layout.padding is not None
    assert layout.padding.values == {"x": -1.0}
    assert (
        why == "on: 'S' is declared to be padded, although output 'y' differs between padded rows and rows as they are"
    )


@pytest.mark.parametrize(
    ("rule", "why"),
    [
        (PadRule("T"), "off: declared, but 'T' is not one axis besides the batch of any input"),
        (PadRule("N"), "off: declared, but 'N' is not one axis besides the batch of any input"),
        (PadRule("S", mask="m"), "off: declared, but the mask 'm' is no input with an axis 'S'"),
        (PadRule(), ""),
    ],
)
def test_declarations_that_mean_nothing_are_named(rule: PadRule, why: str) -> None:
    layout, said = layout_of(pooled(), rule)
    assert (layout.padding, said) == (None, why)


def test_rows_are_padded_gathered_and_cut_apart() -> None:
    padding = Padding({"x": 1, "mask": 1}, {"y": 2}, {"x": 7, "mask": 0})
    layout = Layout({"x": 0, "mask": 0}, {"y": 0, "z": 0}, (4,), padding=padding)
    feeds = [{"x": np.full((rows, n), n), "mask": np.ones((rows, n), bool)} for rows, n in ((1, 2), (2, 5))]
    whole = Gatherer(layout)(feeds, 3, 4, 8)
    np.testing.assert_array_equal(whole["x"][0], [2] * 2 + [7] * 6)
    np.testing.assert_array_equal(whole["x"][1:], [[5] * 5 + [7] * 3] * 3)  # the last row is padding
    np.testing.assert_array_equal(whole["mask"].sum(1), [2, 5, 5, 5])
    outputs = {"y": np.arange(4 * 3 * 8).reshape(4, 3, 8), "z": np.arange(4)}
    first, second = split(outputs, layout, [1, 2], 4, [2, 5], 8)
    np.testing.assert_array_equal(first["y"], outputs["y"][:1, :, :2])
    np.testing.assert_array_equal(second["y"], outputs["y"][1:3, :, :5])
    np.testing.assert_array_equal(second["z"], [1, 2])
    with pytest.raises(ValueError, match="of length 8"):
        list(split({"y": outputs["y"][:, :, 1:], "z": outputs["z"]}, layout, [1, 2], 4, [2, 5], 8))


def test_groups_widen_to_longer_ones_of_equal_shapes() -> None:
    padding = Padding({"x": 1}, {}, {"x": 0})
    layout = Layout({"x": 0}, {}, (4,), padding=padding)

    def group(length: int, width: int = 3) -> Lengthened:
        return lengthened({"x": np.zeros((2, length, width))}, layout, padding, padded_length(length))

    assert group(3) == group(8)
    assert widens(group(3), group(9))
    assert not widens(group(9), group(3))
    assert not widens(group(3), group(9, width=4))
    assert not widens(group(3), ("other",))


# --- served ----------------------------------------------------------------------------------------------------------


def ask(running: Any, got: dict[int, Any], length: int) -> None:
    ids = [list(range(length))]
    inputs = [
        {"name": name, "shape": [1, length], "datatype": "INT64", "data": data}
        for name, data in (("ids", ids), ("attention_mask", [[1] * length]))
    ]
    got[length] = running.infer("m", {"inputs": inputs})


def check(got: dict[int, Any]) -> None:
    for length, (status, reply) in got.items():
        assert status == 200, reply
        outputs = {o["name"]: o for o in reply["outputs"]}
        mean = (length - 1) / 2
        assert outputs["mean"]["data"] == [mean]
        assert outputs["each"]["shape"] == [1, length]
        assert outputs["each"]["data"] == [i + mean for i in range(length)]


def ask_together(
    session: FakeSession, lengths: tuple[int, ...], **settings: Any
) -> tuple[list[Any], dict[int, Any], bytes]:
    """The shapes of the runs, the answers and the metrics of requests that wait for each other."""
    shapes: list[Any] = []
    fn = session.fn

    def noted(feeds: Arrays) -> Arrays:
        shapes.append(feeds["ids"].shape)
        return fn(feeds)

    with serving({"m": session}, **settings) as running:
        session.fn = noted
        model = running.model("m")
        for group in (8, 16, 24, 32, 160):  # as good as free, whatever the machine is busy with
            feeds = {"ids": np.zeros((1, group)), "attention_mask": np.zeros((1, group))}
            costs = model.batcher.schedule.costs.of(model._rows(feeds)[1], 2.0 * group)
            for bucket in costs.buckets:
                for _ in range(32):
                    costs.learn(bucket, 1e-3)
        session.block()
        got: dict[int, Any] = {}
        threads = [threading.Thread(target=ask, args=(running, got, lengths[0]))]
        threads[0].start()
        session.wait_entered()
        for waiting, length in enumerate(lengths[1:], start=1):
            threads.append(threading.Thread(target=ask, args=(running, got, length)))
            threads[-1].start()
            until(lambda waiting=waiting: model.queued == waiting)  # type: ignore[misc]
        session.gate.set()
        for thread in threads:
            thread.join()
        return shapes, got, running.request("GET", "/metrics")[2]


def test_requests_of_unequal_length_share_a_batch_and_get_their_own_length_back() -> None:
    shapes, got, metrics = ask_together(pooled(), (8, 30, 25, 31, 3))
    check(got)
    assert shapes == [(1, 8), (4, 32)]  # 3 rows of 25 to 31, and the short one in the row that is free
    assert b'infera_padding_rows_total{model="m",version="1"} 0.0' in metrics
    waste = (4 * 32 - (30 + 25 + 31 + 3)) / 32
    assert f'infera_padding_waste_rows_total{{model="m",version="1"}} {waste}'.encode() in metrics


def test_padding_can_be_turned_off() -> None:
    shapes, got, _ = ask_together(pooled(), (8, 30, 25), pad={"m": PadRule()})
    check(got)
    assert shapes == [(1, 8), (1, 30), (1, 25)]


def test_a_length_that_the_model_cannot_run_is_not_tried_twice() -> None:
    """A table of 150 positions: rows of 130 and 140 would be made 160 long."""
    session = pooled()
    fn = session.fn

    def limited(feeds: Arrays) -> Arrays:
        if feeds["ids"].shape[1] in range(151, 224):
            raise IndexError("no such position")
        return fn(feeds)

    session.fn = limited
    shapes, got, _ = ask_together(session, (8, 130, 140))
    check(got)
    assert shapes == [(1, 8), (2, 160), (1, 130), (1, 140)]
