"""Steps run when their inputs are there, in shared batches; what does not fit is refused by name."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator
from typing import Any
from weakref import ref

import numpy as np
import pytest
from google.protobuf import json_format

from infera_server.errors import BadRequest, NotFound, Overloaded, RequestError, Unavailable, renamed
from infera_server.models.golden import Golden, Recorder
from infera_server.models.modelconfig import ConfigError
from infera_server.models.servable import Servable
from infera_server.models.taps import Tap
from infera_server.models.versions import Route, Shadowed
from infera_server.pipelines.answers import ResponseCache
from infera_server.pipelines.ensemble import Ensemble
from infera_server.pipelines.ensembles import build
from infera_server.pipelines.response_cache import Cached
from infera_server.pipelines.sequences import wrap
from infera_server.protocols.protos import message
from infera_server.requests import Correlation, Output, Request
from infera_server.scheduling.jobs import State
from infera_server.scheduling.rows import HostArray
from tests.server.desk import Answer, Desk, leaves_nothing, send
from tests.server.support import WAIT, FakeSession, spec


def unary(fn: Callable[[HostArray], HostArray], width: int = 4, dtype: Any = np.float32) -> FakeSession:
    """x [N, width] -> y; a row with -1 in it cannot be used."""

    def run(feeds: Any) -> Any:
        if (feeds["x"] == -1).any():
            raise IndexError("row cannot be used")
        return {"y": fn(feeds["x"])}

    return FakeSession({"x": spec("N", width, dtype=dtype)}, {"y": spec("N", width, dtype=dtype)}, run)


class House:
    """Models by name, and the sessions they run."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.sessions: dict[str, FakeSession] = {}
        self.models: dict[str, Servable] = {}
        self.add("double", unary(lambda x: x * 2))
        self.add("square", unary(lambda x: x * x))
        self.add(
            "sum",
            FakeSession({"a": spec("N", 4), "b": spec("N", 4)}, {"y": spec("N", 4)}, lambda f: {"y": f["a"] + f["b"]}),
        )

    def add(self, name: str, session: FakeSession) -> None:
        self.sessions[name] = session
        self.models[name] = self.desk.open(session, name)
        session.block()
        session.gate.set()

    def lookup(self, name: str, version: str | None) -> Servable:
        if name not in self.models or version not in (None, "1"):
            raise NotFound(f"Request for unknown model: '{name}' is not found")
        return self.models[name]

    def build(self, config: dict[str, Any] | None = None, name: str = "ens", timeout: float = 10.0) -> Ensemble:
        parsed = json_format.ParseDict(config or DIAMOND, message("inference.ModelConfig")())
        ensemble = build(name, "1", parsed, self.lookup, timeout)
        self.models[name] = ensemble
        return ensemble


@pytest.fixture
def house() -> Iterator[House]:
    desk = Desk()
    yield House(desk)
    desk.close()


def tensor(name: str, dims: tuple[int, ...] = (4,), kind: str = "TYPE_FP32") -> dict[str, Any]:
    return {"name": name, "data_type": kind, "dims": list(dims)}


def step(model: str, inputs: dict[str, str], outputs: dict[str, str], version: int = -1) -> dict[str, Any]:
    return {"model_name": model, "model_version": version, "input_map": inputs, "output_map": outputs}


def ensemble(*steps: dict[str, Any], **changed: Any) -> dict[str, Any]:
    return {
        "platform": "ensemble",
        "max_batch_size": 8,
        "input": [tensor("source")],
        "output": [tensor("out")],
        "ensemble_scheduling": {"step": list(steps)},
    } | changed


DOUBLE, SQUARE = step("double", {"x": "source"}, {"y": "d"}), step("square", {"x": "source"}, {"y": "s"})
DIAMOND = ensemble(DOUBLE, SQUARE, step("sum", {"a": "d", "b": "s"}, {"y": "out"}))
"""out = 2 in + in²"""

CHAIN = ensemble(DOUBLE, step("square", {"x": "d"}, {"y": "out"}))
"""out = (2 in)²"""


def x(value: float, rows: int = 1) -> HostArray:
    return np.full((rows, 4), value, np.float32)


def ask(house: House, ensemble: Servable, value: float) -> Answer:
    return house.desk.ask(ensemble, source=x(value))


def test_steps_run_as_their_inputs_come(house: House) -> None:
    ensemble = house.build()
    assert ask(house, ensemble, 3)["out"][0, 0] == 15
    assert list(ask(house, ensemble, 3).outputs) == ["out"]


def test_independent_steps_run_side_by_side(house: House) -> None:
    ensemble = house.build()
    for name in ("double", "square"):
        house.sessions[name].block()
    answer = Answer()
    send(ensemble, answer, source=x(3))
    for name in ("double", "square"):
        house.sessions[name].wait_entered()
    assert not house.sessions["sum"].batches
    for name in ("square", "double"):
        house.sessions[name].gate.set()
    house.desk.until(lambda: answer.count > 0)
    assert answer["out"][0, 0] == 15


def test_steps_of_different_requests_and_of_clients_share_batches(house: House) -> None:
    ensemble = house.build(CHAIN)
    session = house.sessions["double"]
    session.block()
    answers = [Answer() for _ in range(4)]
    for i, answer in enumerate(answers):
        send(ensemble, answer, source=x(i))
        if not i:
            session.wait_entered()
    own = Answer()
    send(house.models["double"], own, x=x(9))
    session.gate.set()
    house.desk.until(lambda: all(a.count for a in (*answers, own)))
    assert [a["out"][0, 0] for a in answers] == [0, 4, 16, 36]
    assert own["y"][0, 0] == 18
    assert session.batches == [1, 4]


def test_arrays_go_from_step_to_step_as_they_are(house: House) -> None:
    """A request that runs alone is fed the very array that the step before made."""
    made: list[HostArray] = []
    fed: list[HostArray] = []

    def make(array: HostArray) -> HostArray:
        made.append(array + 1)
        return made[-1]

    def take(array: HostArray) -> HostArray:
        fed.append(array)
        return array

    house.add("make", unary(make))
    house.add("take", unary(take))
    piped = house.build(ensemble(step("make", {"x": "source"}, {"y": "t"}), step("take", {"x": "t"}, {"y": "out"})))
    ask(house, piped, 1)
    assert np.shares_memory(fed[-1], made[-1])


def test_only_what_is_asked_for_is_made(house: House) -> None:
    made = house.build(ensemble(DOUBLE, SQUARE, output=[tensor("d"), tensor("s")]))
    answer = Answer()
    made.submit(Request("", {"source": x(3)}, [Output("s", binary=True)]), 16, answer)
    house.desk.until(lambda: answer.count > 0)
    assert list(answer.outputs) == ["s"]
    assert not house.sessions["double"].batches


def test_an_output_may_be_a_step_in_between(house: House) -> None:
    both = house.build(CHAIN | {"output": [tensor("d"), tensor("out")]})
    answer = ask(house, both, 3)
    assert (answer["d"][0, 0], answer["out"][0, 0]) == (6, 36)


def test_an_ensemble_may_be_a_step(house: House) -> None:
    house.build(CHAIN, "inner")
    outer = house.build(
        ensemble(step("inner", {"source": "source"}, {"out": "t"}), step("double", {"x": "t"}, {"y": "out"}))
    )
    assert ask(house, outer, 1)["out"][0, 0] == 8
    assert outer.depends == {"inner", "double", "square"}


def test_it_is_described_as_configured(house: House) -> None:
    signature = house.build().signature
    assert {t.name: (t.datatype, t.shape) for t in signature.inputs.values()} == {"source": ("FP32", (-1, 4))}
    assert signature.leading
    alone = ensemble(DOUBLE, max_batch_size=0, output=[tensor("d", (-1, 4))], input=[tensor("source", (-1, 4))])
    made = house.build(alone)
    assert made.signature.layout is None
    assert made.signature.inputs["source"].shape == (-1, 4)
    assert made.device == "cpu"
    assert ask(house, made, 3)["d"][0, 0] == 6


def test_times_of_the_steps_are_those_of_the_ensemble(house: House) -> None:
    ensemble = house.build()
    batch = ask(house, ensemble, 3).batch
    assert batch is not None
    told = ensemble.stats.as_dict()
    assert (told["inference_count"], told["execution_count"]) == (1, 1)
    steps = [house.models[name].stats.as_dict()["inference_stats"] for name in ("double", "square", "sum")]
    own = told["inference_stats"]
    for phase in ("compute_input", "compute_infer", "compute_output"):
        assert own[phase]["ns"] == pytest.approx(sum(s[phase]["ns"] for s in steps), abs=1000)
    assert [b["batch_size"] for b in told["batch_stats"]] == [1]
    assert [(s["success"]["count"], s["fail"]["count"]) for s in steps] == [(1, 0)] * 3
    assert all(s["success"]["ns"] >= s["compute_infer"]["ns"] for s in steps)


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_step_that_fails_ends_the_request_and_cancels_the_others(house: House) -> None:
    failing = house.build(DIAMOND)
    house.sessions["double"].block()
    blocker, answer = Answer(), Answer()
    send(house.models["double"], blocker, x=x(0))
    house.sessions["double"].wait_entered()
    send(failing, answer, source=x(-1))
    house.desk.until(lambda: answer.count > 0)
    assert isinstance(answer.result, BadRequest)
    assert str(answer.result).startswith("in ensemble 'ens', model 'square' cannot run on this input")
    assert house.models["double"].queued == 0
    assert [house.models[name].stats.fail.count for name in ("square", "double")] == [1, 0]
    house.sessions["double"].gate.set()
    house.desk.until(lambda: blocker.count > 0)
    assert house.sessions["double"].batches == [1]
    assert ask(house, failing, 3)["out"][0, 0] == 15


def test_a_request_that_is_cancelled_takes_its_steps_along(house: House) -> None:
    ensemble = house.build(CHAIN)
    session = house.sessions["double"]
    session.block()
    running, waiting = Answer(), Answer()
    jobs = [send(ensemble, answer, source=x(1)) for answer in (running, waiting)]
    session.wait_entered()
    for job in jobs:
        ensemble.cancel(job)
        ensemble.cancel(job)
    assert house.models["double"].queued == 0
    session.gate.set()
    assert ask(house, ensemble, 1)["out"][0, 0] == 4
    assert (running.count, waiting.count) == (0, 0)
    assert house.sessions["square"].batches == [1]


def test_a_step_leaves_the_version_that_it_waits_for(house: House) -> None:
    first = house.models["double"]
    house.add("double", unary(lambda x: x * 3))
    other, session = house.models["double"], house.sessions["double"]
    house.models["double"] = Route([first, other], [1e-12, 1])
    ensemble = house.build(CHAIN)
    session.block()
    send(ensemble, Answer(), source=x(1))
    session.wait_entered()
    waiting = send(ensemble, Answer(), source=x(1))
    assert other.queued == 1
    ensemble.cancel(waiting)
    assert other.queued == 0
    session.gate.set()


def test_what_is_left_of_the_time_goes_along_and_so_does_priority(house: House) -> None:
    seen: list[Request] = []
    square = house.models["square"]
    submit = square.submit

    def watch(request: Request, nbytes: int, done: Any) -> Any:
        seen.append(request)
        return submit(request, nbytes, done)

    square.submit = watch  # type: ignore[method-assign]
    ensemble = house.build(CHAIN)
    answer = Answer()
    send(ensemble, answer, timeout=5.0, priority=2, source=x(1))
    house.desk.until(lambda: answer.count > 0)
    (request,) = seen
    assert request.priority == 2
    assert request.timeout is not None
    assert 0 < request.timeout < 5.0


def test_a_full_queue_of_a_model_refuses_the_ensembles_request(house: House) -> None:
    session = unary(lambda x: x)
    house.models["narrow"] = house.desk.open(session, "narrow", max_queue=1)
    made = house.build(ensemble(step("narrow", {"x": "source"}, {"y": "t"}), step("double", {"x": "t"}, {"y": "out"})))
    session.block()
    answers = [Answer(), Answer()]
    for answer in answers:
        send(made, answer, source=x(1))
        if answer is answers[0]:
            session.wait_entered()
    with pytest.raises(Overloaded, match="in ensemble 'ens', model 'narrow' has 1 requests") as caught:
        send(made, Answer(), source=x(1))
    assert caught.value.retry_after is not None
    with pytest.raises(Overloaded):
        made.check_room(16)
    session.gate.set()
    house.desk.until(lambda: all(a.count for a in answers))
    made.drain()
    assert made.join(0)


def test_a_refusal_keeps_what_it_says_besides_its_words() -> None:
    error = renamed(Overloaded("full", 3.0, "goal"), "in ensemble 'e', full")
    assert isinstance(error, Overloaded)
    assert (str(error), error.retry_after, error.reason) == ("in ensemble 'e', full", 3.0, "goal")


@pytest.mark.parametrize(
    ("feeds", "why"),
    [
        ({"source": x(1, 9)}, "inference request batch-size must be <= 8 for 'ens'"),
        ({"source": x(1, 0)}, "inference request batch-size must be at least 1 for 'ens'"),
        ({"source": x(1, 2), "source2": x(1)}, "input 'source2' batch size does not match other inputs for 'ens'"),
    ],
)
def test_rows_have_to_agree(house: House, feeds: dict[str, HostArray], why: str) -> None:
    both = ensemble(
        step("sum", {"a": "source", "b": "source2"}, {"y": "out"}), input=[tensor("source"), tensor("source2")]
    )
    with pytest.raises(BadRequest, match=why):
        house.build(both).submit(Request("", feeds, []), 0, Answer())


def test_a_shape_that_shows_only_in_a_run_is_refused(house: House) -> None:
    open_shape = FakeSession({"x": spec("N", 4)}, {"y": spec("N", None)}, lambda f: {"y": f["x"][:, :3]})
    house.add("cut", open_shape)
    made = house.build(ensemble(step("cut", {"x": "source"}, {"y": "t"}), step("double", {"x": "t"}, {"y": "out"})))
    answer = ask(house, made, 1)
    assert isinstance(answer.result, BadRequest)
    assert str(answer.result) == (
        "in ensemble 'ens', unexpected shape for input 'x' for model 'double'. Expected [-1,4], got [1,3]."
    )


# --- members come and go ---------------------------------------------------------------------------------------------


def test_without_a_member_it_takes_no_requests(house: House) -> None:
    ensemble = house.build(CHAIN)
    square = house.models.pop("square")
    for refused in (lambda: send(ensemble, Answer(), source=x(1)), lambda: ensemble.check_room(1)):
        with pytest.raises(Unavailable, match="depends on 'square' which has no loaded version"):
            refused()
    assert not house.sessions["double"].batches
    house.models["square"] = square
    assert ask(house, ensemble, 1)["out"][0, 0] == 4


def test_a_member_that_is_unloaded_in_between_ends_the_request(house: House) -> None:
    ensemble = house.build(CHAIN)
    house.sessions["double"].block()
    answer = Answer()
    send(ensemble, answer, source=x(1))
    del house.models["square"]
    house.sessions["double"].gate.set()
    house.desk.until(lambda: answer.count > 0)
    assert isinstance(answer.result, Unavailable)
    ensemble.drain()
    assert ensemble.join(0)


def test_a_member_that_was_loaded_again_is_used_if_it_fits(house: House) -> None:
    ensemble = house.build(CHAIN)
    house.add("square", unary(lambda x: x * x * x))
    assert ask(house, ensemble, 1)["out"][0, 0] == 8
    house.add("square", unary(lambda x: x, width=5))
    with pytest.raises(Unavailable, match=r"inconsistent shape: .* \[-1,5\] is inferred from model square"):
        send(ensemble, Answer(), source=x(1))


def test_it_does_not_keep_members_that_are_gone(house: House) -> None:
    ensemble = house.build(CHAIN)
    ask(house, ensemble, 1)
    model = house.desk.opened.pop(1)
    assert house.models.pop("square") is model
    model.close(WAIT)
    gone = ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_what_was_accepted_is_answered_before_the_end(house: House) -> None:
    ensemble = house.build(CHAIN)
    house.sessions["double"].block()
    answer = Answer()
    send(ensemble, answer, source=x(1))
    ensemble.drain()
    with pytest.raises(Unavailable):
        send(ensemble, Answer(), source=x(1))
    with pytest.raises(Unavailable):
        ensemble.check_room(1)
    assert not ensemble.join(0)
    house.sessions["double"].gate.set()
    house.desk.until(lambda: answer.count > 0)
    assert answer["out"][0, 0] == 4
    assert ensemble.join(0)


def test_giving_up_answers_everything(house: House) -> None:
    ensemble = house.build(CHAIN)
    house.sessions["double"].block()
    answer = Answer()
    job = send(ensemble, answer, source=x(1))
    ensemble.give_up(Unavailable("too late"))
    assert isinstance(answer.result, Unavailable)
    assert job.state is State.ANSWERED
    house.sessions["double"].gate.set()


def test_a_sequence_goes_to_the_members_that_keep_state(house: House) -> None:
    summing = FakeSession(
        {"x": spec("N", 4), "h": spec("N", 4)},
        {"y": spec("N", 4), "hn": spec("N", 4)},
        lambda f: {"y": f["h"] + f["x"], "hn": f["h"] + f["x"]},
    )
    house.add("total", summing)
    house.models["total"] = Tap(wrap(house.desk.opened[-1]))
    made = house.build(ensemble(DOUBLE, step("total", {"x": "d"}, {"y": "out"})))
    answers = [
        house.desk.ask(made, Correlation(5, start=i == 0, end=i == 2), source=x(1))["out"][0, 0] for i in range(3)
    ]
    assert answers == [2, 4, 6]
    refused = house.desk.ask(made, Correlation(5), source=x(1))
    assert isinstance(refused.result, BadRequest)
    assert str(refused.result).startswith("in ensemble 'ens', inference request for sequence 5 to model 'total' must")


# --- what cannot be ---------------------------------------------------------------------------------------------------

TO_OUT = {"y": "out"}

REFUSED: list[tuple[dict[str, Any], str]] = [
    (ensemble(), "must specify 'step' for ensemble 'ens'"),
    (ensemble(step("", {"x": "source"}, TO_OUT)), "must specify 'model_name' in step 0 of ensemble 'ens'"),
    (ensemble(step("double", {}, TO_OUT)), "must specify 'input_map' in step 0 of ensemble 'ens'"),
    (ensemble(DOUBLE, step("double", {"x": "source"}, {})), "must specify 'output_map' in step 1 of ensemble 'ens'"),
    (
        ensemble(step("double", {"x": "source"}, TO_OUT), step("square", {"x": "source"}, TO_OUT)),
        "ensemble tensor 'out' can appear in an output map only once for ensemble 'ens' step 1",
    ),
    (CHAIN | {"input": [tensor("source"), tensor("source2")]}, "ensemble input 'source2' for ensemble ens is not used"),
    (CHAIN | {"output": [tensor("out"), tensor("out2")]}, "ensemble output 'out2' for ensemble ens is not used"),
    (
        ensemble(
            step("sum", {"a": "source", "b": "s"}, {"y": "d"}),
            step("double", {"x": "d"}, {"y": "s"}),
            step("square", {"x": "s"}, TO_OUT),
        ),
        "output 'out' for ensemble 'ens' is not written: at least one of its depending tensors, 'd', is not connected",
    ),
    (
        ensemble(step("sum", {"a": "source", "b": "zz"}, TO_OUT)),
        "output 'out' for ensemble 'ens' is not written: at least one of its depending tensors, 'zz', is not connected",
    ),
    (ensemble(step("double", {"x": "source"}, TO_OUT), SQUARE), "ensemble tensor 's' is unused in ensemble 'ens'"),
    (
        ensemble(step("double", {"x": "source"}, TO_OUT), step("double", {"x": "out"}, {"y": "source"})),
        "ensemble input 'source' for ensemble 'ens' is written by step 1",
    ),
    (
        ensemble(step("nope", {"x": "source"}, {"y": "t"}), step("gone", {"x": "t"}, TO_OUT)),
        "ensemble ens contains models that are not available or ambiguous: gone, nope",
    ),
    (
        ensemble(step("double", {"x": "source"}, TO_OUT, version=7)),
        "ensemble 'ens' depends on 'double' whose required version 7 is not loaded.",
    ),
    (
        ensemble(DOUBLE, step("wide", {"x": "d"}, TO_OUT), output=[tensor("out", (5,))]),
        (
            "in ensemble ens, ensemble tensor d: inconsistent shape: [-1,4] is inferred from model double while [-1,5] "
            "is inferred from model wide"
        ),
    ),
    (
        ensemble(step("double", {"x": "source"}, TO_OUT), output=[tensor("out", (5,))]),
        (
            "in ensemble ens, ensemble tensor out: inconsistent shape: [-1,5] is inferred from model ens while [-1,4] "
            "is inferred from model double"
        ),
    ),
    (
        ensemble(DOUBLE, step("ints", {"x": "d"}, TO_OUT), output=[tensor("out", kind="TYPE_INT32")]),
        (
            "in ensemble ens, ensemble tensor d: inconsistent data type: TYPE_FP32 is inferred from model double while "
            "TYPE_INT32 is inferred from model ints"
        ),
    ),
    (
        ensemble(step("double", {"x": "source", "q": "source"}, TO_OUT)),
        "in ensemble ens, ensemble tensor source is mapping to non-existing input q in model double",
    ),
    (
        ensemble(step("double", {"x": "source"}, {"y": "out", "q": "z"}), output=[tensor("out"), tensor("z")]),
        "in ensemble ens, ensemble tensor z is mapped from non-existing output q in model double",
    ),
    (
        ensemble(step("sum", {"a": "source"}, TO_OUT)),
        "in ensemble ens, input b in model sum is not mapped to any ensemble tensors",
    ),
    (
        ensemble(step("double", {"x": "source"}, TO_OUT), max_batch_size=100),
        (
            "ensemble ens allows maximum batch size 100, but it contains model double which only allows maximum batch "
            "size to be 64"
        ),
    ),
    (ensemble(step("ens", {"source": "source"}, {"out": "out"})), "circular dependency between ensembles: ens -> ens"),
    (
        CHAIN | {"input": [{**tensor("source"), "reshape": {"shape": [2, 2]}}]},
        "tensor 'source' of ensemble 'ens' is reshaped, which only models can be",
    ),
    (CHAIN | {"input": [tensor("source", ())]}, "tensor 'source' of ensemble 'ens' must specify 'dims'"),
    (CHAIN | {"input": [{"name": "source", "dims": [4]}]}, "'source' must specify 'data_type'"),
]


@pytest.mark.parametrize(("config", "why"), REFUSED, ids=[why for _, why in REFUSED])
def test_configurations_that_cannot_be(house: House, config: dict[str, Any], why: str) -> None:
    """The words are those that tritonserver 2.51 was recorded with, where it refuses the same."""
    house.add("wide", unary(lambda x: x, width=5))
    house.add("ints", unary(lambda x: x, dtype=np.int32))
    with pytest.raises(ConfigError) as caught:
        house.build(config)
    assert str(caught.value) == why


def test_a_circle_of_ensembles_is_refused(house: House) -> None:
    house.build(ensemble(step("double", {"x": "source"}, TO_OUT)), "a")
    house.build(ensemble(step("a", {"source": "source"}, {"out": "out"})), "b")
    with pytest.raises(ConfigError, match=re.escape("ensembles: a -> ... -> a")):
        house.build(ensemble(step("b", {"source": "source"}, {"out": "out"})), "a")


def test_an_unloaded_member_refuses_with_what_the_repository_says(house: House) -> None:
    made = house.build(CHAIN)

    def loading(name: str, version: str | None) -> Servable:
        raise Unavailable(f"model '{name}' is still loading")

    made.lookup = loading
    with pytest.raises(RequestError, match="in ensemble 'ens', model 'double' is still loading"):
        send(made, Answer(), source=x(1))


def test_an_answered_request_leaves_nothing_to_collect(house: House) -> None:
    ensemble = house.build()
    assert leaves_nothing(lambda answer: send(ensemble, answer, source=x(3)), house.desk.until)


# --- what stands before its models ------------------------------------------------------------------------------------


def kept(house: House, ensemble: Ensemble) -> Cached:
    def soon(fn: Callable[[], None]) -> None:
        house.desk.post(lambda _: fn(), None)

    return Cached(ensemble, ResponseCache(1 << 20), soon, parts=ensemble.parts)


def test_kept_answers_go_with_the_models_that_gave_them(house: House) -> None:
    """Also those of models of ensembles within it, and where another has come back."""
    house.models["ens"] = kept(house, house.build(CHAIN))
    outer = house.build(ensemble(step("ens", {"source": "source"}, {"out": "out"})), "outer")
    model = kept(house, outer)
    assert [ask(house, model, 3)["out"][0, 0] for _ in range(2)] == [36, 36]
    assert house.sessions["double"].batches == [1]
    before = house.models["double"]
    house.add("double", unary(lambda x: x * 3))
    assert [ask(house, model, 3)["out"][0, 0] for _ in range(2)] == [81, 81]
    assert house.sessions["double"].batches == [1]
    assert model.cache.count == 1
    house.models["double"] = before
    assert ask(house, model, 3)["out"][0, 0] == 36


def test_an_answer_is_not_kept_where_a_model_is_another_when_it_comes(house: House) -> None:
    model = kept(house, house.build(CHAIN))
    session = house.sessions["double"]
    session.block()
    answer = Answer()
    send(model, answer, source=x(3))
    session.wait_entered()
    house.add("double", unary(lambda x: x * 3))
    assert ask(house, model, 4)["out"][0, 0] == 144
    session.gate.set()
    house.desk.until(lambda: answer.count > 0)
    assert model.cache.count == 1
    assert ask(house, model, 3)["out"][0, 0] == 81


def test_answers_of_a_split_model_are_not_kept(house: House) -> None:
    model = kept(house, house.build(CHAIN))
    first = house.models["double"]
    house.add("double", unary(lambda x: x * 3))
    house.models["double"] = Route([first, house.models["double"]], [1, 1])
    assert {ask(house, model, 3)["out"][0, 0] for _ in range(20)} == {36, 81}
    assert not model.cache.count


def _cached(inner: Ensemble, other: Servable) -> Servable:
    return Cached(inner, ResponseCache(1 << 20))


def _recorded(inner: Ensemble, other: Servable) -> Servable:
    return Recorder(inner, Golden(4))


def _split(inner: Ensemble, other: Servable) -> Servable:
    return Route([other, inner], [1, 1])


def _shadow(inner: Ensemble, other: Servable) -> Servable:
    return Recorder(Shadowed(other, inner, 1.0, 0.1), Golden(4))


@pytest.mark.parametrize("before", [_cached, _recorded, _split, _shadow])
def test_a_circle_is_seen_through_what_stands_before_an_ensemble(
    house: House, before: Callable[[Ensemble, Servable], Servable]
) -> None:
    first = house.build(CHAIN)
    inner = house.build(ensemble(step("ens", {"source": "source"}, {"out": "out"})), "inner")
    house.models["inner"] = before(inner, first)
    with pytest.raises(ConfigError, match=re.escape("circular dependency between ensembles: ens -> ... -> ens")):
        house.build(ensemble(step("inner", {"source": "source"}, {"out": "out"})))
