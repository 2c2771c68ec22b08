from hypothesis import given, settings
from hypothesis import strategies as st

from infera_gpu.memory import ALIGN, Request, aligned, plan_arena


@st.composite
def requests(draw: st.DrawFn) -> list[Request]:
    rows = draw(st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 20), st.integers(1, 6)), max_size=30))
    return [Request(f"v{i}", nbytes, begin, begin + length) for i, (nbytes, begin, length) in enumerate(rows)]


def overlap(a: Request, b: Request) -> bool:
    return a.begin < b.end and b.begin < a.end


@settings(deadline=None)
@given(requests())
def test_values_alive_together_never_overlap(wanted: list[Request]) -> None:
    plan = plan_arena(wanted)
    for i, a in enumerate(wanted):
        low = plan.offsets[a.value]
        assert low % ALIGN == 0
        assert low + aligned(a.nbytes) <= plan.nbytes
        for b in wanted[i + 1 :]:
            if overlap(a, b):
                other = plan.offsets[b.value]
                assert low + aligned(a.nbytes) <= other or other + aligned(b.nbytes) <= low
    peak = max((sum(aligned(r.nbytes) for r in wanted if r.begin <= s < r.end) for s in range(30)), default=0)
    assert peak == plan.lower_bound <= plan.nbytes <= sum(aligned(r.nbytes) for r in wanted)


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
