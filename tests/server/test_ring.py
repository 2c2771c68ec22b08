"""What processes share and tell each other: blocks of memory, rings, rates, messages. Both ends are in this one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from infera_server.access import BUCKET_BYTES, SharedBucket
from infera_server.errors import Overloaded, Unavailable
from infera_server.processes import arena
from infera_server.processes.arena import Blocks, Lent
from infera_server.processes.channel import Channel, Content
from infera_server.processes.front_wire import put, read
from infera_server.processes.ring import Reader, Writer, ring_fds
from infera_server.processes.segment import STEP, Segment, shared_file
from infera_server.scheduling.rows import HostArray

LIMIT = 1 << 20


@pytest.fixture
def ends() -> Iterator[tuple[Blocks, Lent]]:
    file = shared_file("test")
    blocks, lent = Blocks(file, LIMIT), Lent(os.dup(file))
    yield blocks, lent
    blocks.close()
    lent.close()


def returned(blocks: Blocks, lent: Lent) -> None:
    """What the engine and the worker do now and then."""
    while lent.returned:
        blocks.give_back(lent.returned.popleft())
    blocks.collect()


# --- blocks --------------------------------------------------------------------------------------------------------


def test_blocks_never_overlap_and_the_limit_holds(ends: tuple[Blocks, Lent]) -> None:
    blocks, _ = ends
    dice = random.Random(0)
    held: dict[int, int] = {}
    refused = 0
    for _ in range(5000):
        size = dice.choice((1, 64, 100, 3000, 3001, 40_000, 200_000))
        if held and dice.random() < 0.4:
            offset = dice.choice(list(held))
            del held[offset]
            blocks.give_back(offset)
            continue
        try:
            held[blocks.take(size)] = size
        except Overloaded:
            refused += 1
    spans = sorted(held.items())
    assert refused
    assert blocks.taken == len(held)
    assert all(start + size <= after for (start, size), (after, _) in pairwise(spans))
    assert spans[-1][0] + spans[-1][1] <= LIMIT


def test_free_neighbours_make_room_for_a_larger_block(ends: tuple[Blocks, Lent]) -> None:
    blocks, _ = ends
    small = [blocks.take(LIMIT // 64) for _ in range(64)]
    with pytest.raises(Overloaded):
        blocks.take(1)
    for offset in small[10:30]:
        blocks.give_back(offset)
    assert blocks.take(LIMIT // 4) == small[10]
    with pytest.raises(Overloaded):
        blocks.take(LIMIT // 8)
    for offset in (*small[:10], *small[30:], small[10]):
        blocks.give_back(offset)
    assert blocks.take(LIMIT) == 0


def test_a_block_is_free_once_nobody_views_it(ends: tuple[Blocks, Lent]) -> None:
    blocks, lent = ends
    sent = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "t": np.array(["ü", "b"], object)}
    document, arrays = read(lent, put(blocks, {"x": 1}, sent))
    assert document == {"x": 1}
    assert np.array_equal(arrays["a"], sent["a"])
    assert arrays["t"].tolist() == ["ü", "b"]
    row: HostArray = arrays["a"][1:]
    del arrays
    returned(blocks, lent)
    assert blocks.taken == 1
    assert row.tolist() == [[3, 4, 5]]
    del row
    returned(blocks, lent)
    assert blocks.taken == 0


def test_memory_that_nobody_needs_goes_back_to_the_system(
    ends: tuple[Blocks, Lent], monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks, lent = ends
    rng = np.random.default_rng(0)
    monkeypatch.setattr(arena, "KEPT", 1 << 16)
    monkeypatch.setattr(arena, "LARGE", 1 << 14)
    resident: list[int] = []
    for most in (LIMIT // 8, LIMIT // 3, LIMIT // 16) * 10:
        held: list[tuple[int, HostArray]] = []
        with contextlib.suppress(Overloaded):
            while True:
                written = rng.integers(0, 256, int(rng.integers(1, most)), np.uint8)
                offset = blocks.take(len(written))
                memory = blocks.reaching(offset + len(written), grow=True)
                memory[offset : offset + len(written)] = written.tobytes()
                held.append((offset, written))
        for offset, written in held:
            np.testing.assert_array_equal(lent.block(offset, len(written)), written)
            blocks.give_back(offset)
        lent.returned.clear()
        resident.append(os.fstat(blocks.fd).st_blocks * 512)
    assert blocks.taken == 0
    assert max(resident) <= LIMIT + STEP
    assert min(resident) < LIMIT // 4


def test_memory_stays_where_the_system_does_not_take_it(
    ends: tuple[Blocks, Lent], monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks, _ = ends
    monkeypatch.setattr(arena, "KEPT", 0)
    monkeypatch.setattr(arena, "LARGE", 1)
    monkeypatch.setattr(blocks, "empty", lambda offset, nbytes: False)
    for _ in range(3):
        offset = blocks.take(5000)
        blocks.reaching(offset + 5000, grow=True)[offset : offset + 3] = b"abc"
        blocks.give_back(offset)
    assert blocks.take(5000) == offset
    assert blocks.taken == 1


@pytest.mark.parametrize("first", ["writer", "reader"])
def test_what_lies_in_shared_memory_already_is_not_copied(ends: tuple[Blocks, Lent], first: str) -> None:
    blocks, lent = ends
    memory: Any = blocks.array(1000)
    body = memoryview(memory)[8:].toreadonly()
    x = np.frombuffer(body[:400], np.float32).reshape(10, 10)
    y = np.arange(3)
    _, arrays = read(lent, put(blocks, "d", {"x": x, "y": y}))
    memory[8:408].view(np.float32)[:] = np.arange(100)
    assert np.array_equal(arrays["x"], np.arange(100).reshape(10, 10))
    assert arrays["y"].tolist() == [0, 1, 2]
    if first == "writer":
        del memory, body, x
    else:
        del arrays
    returned(blocks, lent)
    assert blocks.taken == (2 if first == "writer" else 1)
    memory = body = x = arrays = None  # type: ignore[assignment]
    returned(blocks, lent)
    assert blocks.taken == 0


def test_bodies_get_no_more_than_half(ends: tuple[Blocks, Lent]) -> None:
    blocks, lent = ends
    body = blocks.array(LIMIT // 2)
    with pytest.raises(Overloaded, match="for bodies"):
        blocks.array(1)
    assert blocks.take(LIMIT // 2)
    del body
    returned(blocks, lent)
    assert blocks.array(LIMIT // 2).nbytes == LIMIT // 2


# --- rings ---------------------------------------------------------------------------------------------------------


def test_numbers_come_in_order_however_many_wait() -> None:
    memory, event = ring_fds("test", 8)
    writer, reader = Writer(memory, event), Reader(os.dup(memory), os.dup(event))
    dice = random.Random(1)
    sent = 0
    got: list[int] = []
    assert reader.take() == []
    while sent < 1000:
        for _ in range(dice.randrange(20)):
            writer.put(sent)
            sent += 1
        if dice.random() < 0.5:
            writer.flush()
        if dice.random() < 0.5:
            got += reader.take()
    while len(got) < sent:
        writer.flush()
        got += reader.take()
    assert got == list(range(sent))
    writer.close()
    reader.close()


# --- rates and messages --------------------------------------------------------------------------------------------


def test_a_rate_is_counted_by_all_who_share_it() -> None:
    file = shared_file("test")
    os.posix_fallocate(file, 0, 2 * BUCKET_BYTES)
    first, second, other = SharedBucket(file, 0), SharedBucket(file, 0), SharedBucket(file, 1)
    taken = [bucket.take(2.0, 100.0) for bucket in (first, second, first, second)]
    assert taken == [0.0] * 4
    assert first.take(2.0, 100.0) == second.take(2.0, 100.0) == 0.5
    assert other.take(2.0, 100.0) == 0.0
    assert second.take(2.0, 100.5) == 0.0
    assert first.take(2.0, 100.25) == 0.5  # a clock that was read before the other's
    os.close(file)


def test_messages_are_answered_or_their_failure_is_told() -> None:
    async def main() -> None:
        heard: list[Any] = []

        async def double(document: Any, body: bytes) -> Content:
            return document * 2, body * 2

        async def refuse(document: Any, body: bytes) -> Content:
            raise Overloaded("too much", 2.5)

        async def hear(document: Any, body: bytes) -> Content:
            heard.append(document)
            return None, b""

        async def wait(document: Any, body: bytes) -> Content:
            await asyncio.Event().wait()
            raise AssertionError

        handlers = {"double": double, "refuse": refuse, "hear": hear, "wait": wait}
        lost = asyncio.Event()
        ours, theirs = socket.socketpair()
        one = await Channel.over(ours, handlers, lost.set)
        two = await Channel.over(theirs, handlers, lambda: None)
        large = b"x" * 3_000_000
        answers = await asyncio.gather(*(end.ask("double", n, large) for n, end in enumerate((one, two, one))))
        assert [document for document, _ in answers] == [0, 2, 4]
        assert all(body == large * 2 for _, body in answers)
        with pytest.raises(Overloaded, match="too much") as caught:
            await one.ask("refuse")
        assert caught.value.retry_after == 2.5
        one.tell("hear", [1, None])
        await one.ask("double", 1)
        assert heard == [[1, None]]
        waiting = asyncio.create_task(one.ask("wait"))
        await asyncio.sleep(0)
        two.close()
        with pytest.raises(Unavailable):
            await waiting
        await lost.wait()
        with pytest.raises(Unavailable):
            await one.ask("double", 1)
        one.close()

    asyncio.run(main())


def test_no_part_that_is_sent_is_empty() -> None:
    """asyncio's transports of Python 3.12 and 3.13 try for ever to send one that is."""

    class Transport:
        def __init__(self) -> None:
            self.parts: list[bytes] = []

        def writelines(self, parts: list[bytes]) -> None:
            self.parts += parts

    async def main() -> None:
        channel, transport = Channel({}, lambda: None), Transport()
        channel.connection_made(transport)  # type: ignore[arg-type]
        channel.tell("hear", [1])
        assert transport.parts
        assert all(transport.parts)

    asyncio.run(main())


def test_arrays_that_lie_where_those_before_lay_are_viewed_as_they_are_now() -> None:
    fd = shared_file("test-again")
    ours, theirs = Segment(fd), Segment(os.dup(fd))
    rng = np.random.default_rng(0)
    large = {"x": rng.random(STEP, np.float32)}
    texts = {"x": np.array(["a", "bc"], object), "y": np.zeros(2)}
    others = {"x": rng.random((3, 4), np.float32)}, {"x": rng.random((4, 3), np.float32)}, {"y": rng.random(6)}
    for arrays in (*others, *others, large, others[0], texts, {**texts, "x": np.array(["d", "ef"], object)}, large):
        for scale in (1, 2):
            sent = {n: a if a.dtype.hasobject else a * a.dtype.type(scale) for n, a in arrays.items()}
            found = theirs.views(ours.put(sent))
            assert list(found) == list(sent)
            for name, array in sent.items():
                np.testing.assert_array_equal(found[name], array)
            found.clear()  # it is the caller's own
    for segment in (ours, theirs):
        segment.close()
