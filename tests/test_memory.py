from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infera_gpu import memory
from infera_gpu.memory import ALIGN, SLACK, ArenaPlan, Request, aligned, plan_arena


@st.composite
def requests(draw: st.DrawFn) -> list[Request]:
    rows = draw(st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 20), st.integers(1, 6)), max_size=30))
    return [Request(f"v{i}", nbytes, begin, begin + length) for i, (nbytes, begin, length) in enumerate(rows)]


def puzzle(seed: int, cuts: int = 5) -> list[Request]:
    """A full arena of 100 units and 100 steps, cut into pieces at random: they can be put together without a gap."""
    choose = random.Random(seed)
    pieces = [(0, 100, 0, 100)]
    for _ in range(cuts):
        parts = []
        for low, high, begin, end in pieces:
            if choose.random() < 0.5 and high - low > 1:
                middle = choose.randint(low + 1, high - 1)
                parts += [(low, middle, begin, end), (middle, high, begin, end)]
            elif end - begin > 1:
                middle = choose.randint(begin + 1, end - 1)
                parts += [(low, high, begin, middle), (low, high, middle, end)]
            else:
                parts.append((low, high, begin, end))
        pieces = parts
    return [Request(f"v{i}", ALIGN * (high - low), b, e) for i, (low, high, b, e) in enumerate(pieces)]


def overlap(a: Request, b: Request) -> bool:
    return a.begin < b.end and b.begin < a.end


def check(wanted: list[Request], plan: ArenaPlan) -> None:
    for i, a in enumerate(wanted):
        low = plan.offsets[a.value]
        assert low % ALIGN == 0
        assert low + aligned(a.nbytes) <= plan.nbytes
        for b in wanted[i + 1 :]:
            if overlap(a, b):
                other = plan.offsets[b.value]
                assert low + aligned(a.nbytes) <= other or other + aligned(b.nbytes) <= low
    steps = {r.begin for r in wanted}
    peak = max((sum(aligned(r.nbytes) for r in wanted if r.begin <= s < r.end) for s in steps), default=0)
    assert peak == plan.lower_bound <= plan.nbytes <= sum(aligned(r.nbytes) for r in wanted)


@settings(deadline=None)
@given(requests())
def test_values_alive_together_never_overlap(wanted: list[Request]) -> None:
    check(wanted, plan_arena(wanted))


@pytest.mark.parametrize("seed", [*range(40), 293])
def test_an_arena_is_as_small_as_it_can_be(seed: int) -> None:
    wanted = puzzle(seed)
    plan = plan_arena(wanted)
    check(wanted, plan)
    assert plan.lower_bound == 100 * ALIGN
    assert plan.nbytes <= (1 + SLACK) * plan.lower_bound
    assert plan_arena(reversed(wanted)) == plan, "the order of requests decides nothing"


def decoder(ids: int, state: int, source: int, own: int, cross: int, wide: int, logits: int) -> list[Request]:
    """Two layers of Whisper's decoder: keys and values that are outputs, scratch of attention, the linear layers."""
    spans = {
        ids: ((0, 1),),
        source: ((0, 30), (11, 39), (12, 39), (28, 39), (29, 39)),
        own: ((6, 7), (23, 24)),
        cross: ((13, 14), (30, 31)),
        wide: ((17, 19), (34, 36)),
        logits: ((37, 39),),
        state: (
            *((0, 9), (2, 6), (3, 7), (4, 39), (5, 39), (6, 8), (7, 9), (8, 16), (9, 11), (10, 14), (13, 15), (14, 16)),
            *((15, 19), (16, 18), (18, 26), (19, 23), (20, 24), (21, 39), (22, 39), (23, 25), (24, 26), (25, 33)),
            *((26, 28), (27, 31), (30, 32), (31, 33), (32, 36), (33, 35), (35, 38)),
        ),
    }
    return [Request(f"{size} {span}", size, *span) for size, alive in spans.items() for span in alive]


@pytest.mark.parametrize(
    "sizes",
    [(2640, 84480, 201216, 341504, 263680, 168960, 396000), (296, 9472, 7936, 35072, 29952, 18944, 44400)],
    ids=["6x55", "1x37"],
)
def test_a_search_without_luck_begins_again(sizes: tuple[int, int, int, int, int, int, int]) -> None:
    wanted = decoder(*sizes)
    plan = plan_arena(wanted)
    check(wanted, plan)
    assert plan.nbytes <= (1 + SLACK) * plan.lower_bound


def test_greedy_alone_would_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "SLACK", 1.0)
    assert sum(plan_arena(puzzle(seed)).nbytes > (1 + SLACK) * 100 * ALIGN for seed in range(40)) > 10


@given(requests(), st.data())
@settings(deadline=None)
def test_a_search_leaves_what_is_fixed(wanted: list[Request], data: st.DataObject) -> None:
    before = plan_arena(wanted)
    kept = {r.value for r in wanted if data.draw(st.booleans())}
    fixed = {v: at for v, at in before.offsets.items() if v in kept}
    plan = plan_arena(wanted, fixed)
    assert fixed.items() <= plan.offsets.items()
    for i, a in enumerate(wanted):
        for b in wanted[i + 1 :]:
            low, other = plan.offsets[a.value], plan.offsets[b.value]
            assert not overlap(a, b) or low + aligned(a.nbytes) <= other or other + aligned(b.nbytes) <= low


def test_a_search_ends_where_nothing_better_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = puzzle(3)
    monkeypatch.setattr(memory, "SLACK", 1.0)
    greedy = plan_arena(wanted)
    monkeypatch.undo()
    assert greedy.nbytes > (1 + SLACK) * greedy.lower_bound
    monkeypatch.setattr(memory, "EFFORT", 0)
    monkeypatch.setattr(memory, "ATTEMPT", 0)
    assert plan_arena(wanted) == greedy


def test_what_is_needed_longest_lies_lowest() -> None:
    wanted = [Request("large", 4096, 0, 3), Request("kept", 256, 0, 3, rank=2), Request("long", 512, 1, 3, rank=1)]
    assert plan_arena(wanted).offsets == {"kept": 0, "long": 256, "large": 768}


def test_memory_is_reused_after_the_last_use() -> None:
    plan = plan_arena([Request("a", 1000, 0, 2), Request("b", 1000, 1, 3), Request("c", 1000, 2, 4)])
    assert plan.offsets["a"] == plan.offsets["c"] != plan.offsets["b"]
    assert plan.nbytes == plan.lower_bound == 2 * aligned(1000)


def test_fixed_requests_stay_where_they_are() -> None:
    plan = plan_arena([Request("new", 4096, 0, 2), Request("old", 512, 0, 1)], fixed={"old": 1024})
    assert plan.offsets == {"old": 1024, "new": 1536}
    assert plan.nbytes == 1536 + 4096


def test_empty_and_dead_requests_take_no_room() -> None:
    assert plan_arena([Request("empty", 0, 0, 5), Request("dead", 100, 3, 3)]).nbytes == 0
