"""State is kept per sequence: found or declared, in order, in batches, and never where a step failed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format

from infera_gpu.spec import TensorSpec
from infera_server.errors import BadRequest, Expired, Overloaded, RequestError, Unavailable
from infera_server.models.modelconfig import ConfigError
from infera_server.pipelines.recurrence import find
from infera_server.pipelines.sequence_config import ignored_in_sequences
from infera_server.pipelines.sequence_model import SequenceModel
from infera_server.pipelines.sequence_steps import Limits
from infera_server.pipelines.sequences import wrap
from infera_server.protocols.protos import message
from infera_server.requests import Correlation, all_outputs, check_complete
from infera_server.scheduling.jobs import Job
from infera_server.scheduling.jobs import State as JobState
from infera_server.scheduling.rows import Arrays, HostArray, Layout
from tests.server.desk import Answer, Desk, leaves_nothing, send
from tests.server.support import WAIT, FakeSession, spec


@pytest.fixture
def desk() -> Iterator[Desk]:
    desk = Desk()
    yield desk
    desk.close()


def x(value: float) -> HostArray:
    return np.full((1, 2), value, np.float32)


def first(identity: int | str = 1) -> Correlation:
    return Correlation(identity, start=True)


def then(identity: int | str = 1) -> Correlation:
    return Correlation(identity)


def last(identity: int | str = 1) -> Correlation:
    return Correlation(identity, end=True)


def summing() -> FakeSession:
    """x [N, 2], sum [N, 2] -> y [N, 2], the sum so far; a row with -1 in it cannot be used."""

    def fn(feeds: Arrays) -> Arrays:
        if (feeds["x"] == -1).any():
            raise IndexError("row cannot be used")
        total = feeds["sum"] + feeds["x"]
        return {"y": total, "sum_out": total.copy()}

    return FakeSession({"x": spec("N", 2), "sum": spec("N", 2)}, {"y": spec("N", 2), "sum_out": spec("N", 2)}, fn)


def sequences(desk: Desk, session: FakeSession, **limits: Any) -> SequenceModel:
    model = wrap(desk.open(session), limits=Limits(**limits))
    assert isinstance(model, SequenceModel)
    session.block()
    session.gate.set()
    return model


def test_a_sequence_carries_its_state(desk: Desk) -> None:
    model = sequences(desk, summing())
    steps = [(first(), 1), (then(), 2), (then(), 3), (last(), 4)]
    assert [desk.ask(model, c, x=x(v))["y"][0, 0] for c, v in steps] == [1, 3, 6, 10]
    assert (model.sequences, model.state_bytes) == (0, 0)


def test_a_request_of_no_sequence_runs_as_ever(desk: Desk) -> None:
    model = sequences(desk, summing())
    desk.ask(model, first(), x=x(5))
    assert desk.ask(model, x=x(1), sum=x(10))["y"][0, 0] == 11
    with pytest.raises(BadRequest, match="missing required input"):
        desk.ask(model, x=x(1))
    assert desk.ask(model, then(), x=x(1))["y"][0, 0] == 6


def test_states_may_be_left_out_and_are_still_told(desk: Desk) -> None:
    signature = sequences(desk, summing()).signature
    assert {name: tensor.optional for name, tensor in signature.inputs.items()} == {"x": False, "sum": True}
    check_complete({"x"}, signature)
    assert [output.name for output in all_outputs(signature, binary=True)] == ["y", "sum_out"]


def test_a_state_that_a_step_feeds_is_used_instead_of_the_kept(desk: Desk) -> None:
    model = sequences(desk, summing())
    assert desk.ask(model, first(), x=x(1), sum=x(100))["y"][0, 0] == 101
    assert desk.ask(model, then(), x=x(1))["y"][0, 0] == 102


def test_identities_are_numbers_or_texts(desk: Desk) -> None:
    model = sequences(desk, summing())
    desk.ask(model, first(1), x=x(1))
    desk.ask(model, first("1"), x=x(10))
    assert desk.ask(model, then(1), x=x(1))["y"][0, 0] == 2
    assert desk.ask(model, then("1"), x=x(1))["y"][0, 0] == 11


def test_steps_of_different_sequences_share_batches_and_those_of_one_keep_their_order(desk: Desk) -> None:
    session = summing()
    model = sequences(desk, session)
    session.block()
    blocker = Answer()
    send(model, blocker, x=x(0), sum=x(0))
    session.wait_entered()
    answers = {(s, i): Answer() for i in range(3) for s in range(4)}
    for (s, i), answer in answers.items():
        send(model, answer, Correlation(s + 1, start=i == 0, end=i == 2), x=x(10**s))
    assert (model.waiting, model.queued) == (8, 12)
    session.gate.set()
    desk.until(lambda: all(a.count for a in answers.values()))
    for (s, i), answer in answers.items():
        assert answer["y"][0, 0] == (i + 1) * 10**s
    assert sum(session.batches) >= 13
    assert len(session.batches) <= 7
    assert session.batches[1] == 4
    assert model.sequences == model.waiting == 0


def test_sequences_of_several_rows(desk: Desk) -> None:
    model = sequences(desk, summing())
    rows = np.array([[1, 2], [3, 4]], np.float32)
    desk.ask(model, first(), x=rows)
    np.testing.assert_array_equal(desk.ask(model, then(), x=rows)["y"], 2 * rows)
    with pytest.raises(BadRequest, match="batch size does not match"):
        desk.ask(model, then(), x=rows[:1])
    np.testing.assert_array_equal(desk.ask(model, then(), x=rows)["y"], 3 * rows)


def test_a_state_does_not_keep_its_batch(desk: Desk) -> None:
    session = summing()
    model = sequences(desk, session)
    session.block()
    answers = [Answer() for _ in range(5)]
    for i, answer in enumerate(answers):
        send(model, answer, first(i + 1), x=x(1))
    session.gate.set()
    desk.until(lambda: all(a.count for a in answers))
    assert all(s.state is not None and s.state["sum"].base is None for s in model._sequences.values())
    assert model.state_bytes == 5 * 8


# --- what is refused -------------------------------------------------------------------------------------------------


def test_the_first_step_says_so(desk: Desk) -> None:
    model = sequences(desk, summing())
    text = (
        "inference request for sequence 7 to model 'm' must specify the START flag on the first request of the sequence"
    )
    with pytest.raises(BadRequest, match=text):
        desk.ask(model, then(7), x=x(1))
    desk.ask(model, Correlation(7, start=True, end=True), x=x(1))
    with pytest.raises(BadRequest, match=text):
        desk.ask(model, then(7), x=x(1))


def test_a_step_behind_the_last_is_refused_before_that_has_run(desk: Desk) -> None:
    session = summing()
    model = sequences(desk, session)
    session.block()
    ends = Answer()
    send(model, ends, Correlation(1, start=True, end=True), x=x(1))
    with pytest.raises(BadRequest, match="START flag"):
        send(model, Answer(), then(), x=x(1))
    again = Answer()
    send(model, again, first(), x=x(2))
    session.gate.set()
    desk.until(lambda: again.count > 0)
    assert (ends["y"][0, 0], again["y"][0, 0]) == (1, 2)
    assert model.sequences == 1


@pytest.mark.parametrize("identity", [0, ""])
def test_a_sequence_has_a_name(desk: Desk, identity: int | str) -> None:
    with pytest.raises(BadRequest, match="must specify a non-zero or non-empty correlation ID"):
        desk.ask(sequences(desk, summing()), first(identity), x=x(1))


@pytest.mark.parametrize(
    ("limits", "requests"),
    [
        ({"sequences": 2}, [first(1), first(2), first(3)]),
        ({"state_bytes": 16}, [first(1), first(2), first(3)]),
    ],
)
def test_sequences_and_their_bytes_are_limited(desk: Desk, limits: dict[str, int], requests: list[Correlation]) -> None:
    model = sequences(desk, summing(), **limits)
    for correlation in requests[:-1]:
        desk.ask(model, correlation, x=x(1))
    with pytest.raises(Overloaded, match="2 sequences under way") as caught:
        desk.ask(model, requests[-1], x=x(1))
    assert caught.value.retry_after is not None
    assert desk.ask(model, last(1), x=x(1))["y"][0, 0] == 2
    desk.ask(model, requests[-1], x=x(1))


def test_steps_that_wait_are_limited(desk: Desk) -> None:
    session = summing()
    model = sequences(desk, session, waiting=2)
    session.block()
    answers = [Answer() for _ in range(3)]
    for i, answer in enumerate(answers):
        send(model, answer, Correlation(1, start=i == 0), x=x(1))
    with pytest.raises(Overloaded, match="2 requests waiting"):
        send(model, Answer(), then(), x=x(1))
    session.gate.set()
    desk.until(lambda: answers[-1].count > 0)
    assert answers[-1]["y"][0, 0] == 3


def test_a_state_that_grows_over_the_limit_is_not_kept(desk: Desk) -> None:
    """Keys of all steps so far, as of an attention's cache: 8 bytes a step."""
    session = FakeSession(
        {"x": spec("N", 2), "keys": spec("N", "T", 2)},
        {"y": spec("N"), "keys_out": spec("N", "U", 2)},
        lambda f: {
            "y": np.full(len(f["x"]), f["keys"].shape[1], np.float32),
            "keys_out": np.concatenate([f["keys"], f["x"][:, None]], 1),
        },
    )
    state = "state { input_name: 'keys' output_name: 'keys_out' data_type: TYPE_FP32 dims: [-1, 2] initial_state { "
    state += "name: 'empty' data_type: TYPE_FP32 dims: [0, 2] zero_data: true } }"
    model = wrap(
        desk.open(session), config(f"max_batch_size: 4 sequence_batching {{ {state} }}"), Limits(state_bytes=20)
    )
    assert desk.ask(model, first(), x=x(1))["y"][0] == 0
    assert desk.ask(model, then(), x=x(1))["y"][0] == 1
    for _ in range(2):
        assert isinstance(desk.ask(model, then(), x=x(1)).result, Overloaded)
    assert isinstance(model, SequenceModel)
    assert model.state_bytes == 16


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_failed_step_leaves_the_state_and_takes_those_behind_it_along(desk: Desk) -> None:
    session = summing()
    model = sequences(desk, session)
    desk.ask(model, first(), x=x(1))
    session.block()
    answers = [Answer() for _ in range(4)]
    for correlation, value, answer in zip((then(), then(), then(), first()), (-1, 1, 1, 7), answers, strict=True):
        send(model, answer, correlation, x=x(value))
    session.gate.set()
    desk.until(lambda: answers[-1].count > 0)
    assert all(isinstance(a.result, BadRequest) and "row cannot be used" in str(a.result) for a in answers[:3])
    assert answers[3]["y"][0, 0] == 7
    assert desk.ask(model, then(), x=x(1))["y"][0, 0] == 8
    assert isinstance(desk.ask(model, then(), x=x(-1)).result, BadRequest)
    assert desk.ask(model, then(), x=x(1))["y"][0, 0] == 9


def test_a_failure_is_its_own_sequences_alone(desk: Desk) -> None:
    session = summing()
    model = sequences(desk, session)
    session.block()
    answers = [Answer() for _ in range(3)]
    for i, answer in enumerate(answers):
        send(model, answer, first(i + 1), x=x(-1 if i == 1 else 1))
    session.gate.set()
    desk.until(lambda: all(a.count for a in answers))
    assert isinstance(answers[1].result, BadRequest)
    assert (answers[0]["y"][0, 0], answers[2]["y"][0, 0]) == (1, 1)
    assert model.sequences == 2  # a first step that fails leaves none


def test_a_last_step_that_fails_can_be_sent_again(desk: Desk) -> None:
    model = sequences(desk, summing())
    desk.ask(model, first(), x=x(1))
    assert isinstance(desk.ask(model, last(), x=x(-1)).result, BadRequest)
    assert desk.ask(model, last(), x=x(1))["y"][0, 0] == 2
    assert model.sequences == 0


def test_a_cancelled_step_never_changes_the_state(desk: Desk) -> None:
    """Neither one that waits nor one that runs."""
    session = summing()
    model = sequences(desk, session)
    desk.ask(model, first(), x=x(1))
    session.block()
    running, waiting, behind, fresh = (Answer() for _ in range(4))
    jobs = [send(model, a, c, x=x(5)) for a, c in ((running, then()), (waiting, then()), (behind, then()))]
    send(model, fresh, first(2), x=x(3))
    session.wait_entered()
    model.cancel(jobs[1])
    assert isinstance(behind.result, Unavailable)
    assert "a request before it in sequence 1 was cancelled" in str(behind.result)
    model.cancel(jobs[0])
    model.cancel(jobs[0])
    session.gate.set()
    desk.until(lambda: fresh.count > 0)
    assert desk.ask(model, then(), x=x(1))["y"][0, 0] == 2
    assert (running.count, waiting.count, behind.count) == (0, 0, 1)
    assert model.waiting == 0


def test_a_step_that_waits_expires(desk: Desk) -> None:
    session = summing()
    model = sequences(desk, session)
    session.block()
    head, late = Answer(), Answer()
    send(model, head, first(), x=x(1))
    send(model, late, then(), x=x(1), timeout=0.001)
    now = model.clock()
    model.clock = lambda: now + 0.01
    model.expire()
    assert isinstance(late.result, Expired)
    assert "in sequence 1" in str(late.result)
    session.gate.set()
    desk.until(lambda: head.count > 0)
    assert desk.ask(model, then(), x=x(1))["y"][0, 0] == 2


def test_silence_ends_a_sequence(desk: Desk) -> None:
    model = sequences(desk, summing(), idle=5.0)
    now = [100.0]
    model.clock = lambda: now[0]
    desk.ask(model, first(1), x=x(1))
    now[0] += 3
    desk.ask(model, first(2), x=x(1))
    now[0] += 3
    model.expire()
    assert desk.ask(model, then(2), x=x(1))["y"][0, 0] == 2
    with pytest.raises(BadRequest, match="sequence 1 to model 'm' must specify the START flag"):
        desk.ask(model, then(1), x=x(1))
    assert model.sequences == 1


def test_a_sequence_that_works_is_not_silent(desk: Desk) -> None:
    session = summing()
    model = sequences(desk, session, idle=5.0)
    session.block()
    answer = Answer()
    send(model, answer, first(), x=x(1))
    now = model.clock()
    model.clock = lambda: now + 6
    model.expire()
    session.gate.set()
    desk.until(lambda: answer.count > 0)
    assert desk.ask(model, then(), x=x(1))["y"][0, 0] == 2


def test_what_was_accepted_is_run_before_the_end(desk: Desk) -> None:
    session = summing()
    model = sequences(desk, session)
    session.block()
    answers = [Answer() for _ in range(3)]
    for i, answer in enumerate(answers):
        send(model, answer, Correlation(1, start=i == 0), x=x(1))
    model.drain()
    with pytest.raises(Unavailable):
        send(model, Answer(), then(), x=x(1))
    session.gate.set()
    desk.until(lambda: all(a.count for a in answers))
    assert answers[2]["y"][0, 0] == 3
    assert model.join(WAIT)


def test_giving_up_answers_everything(desk: Desk) -> None:
    session = summing()
    model = sequences(desk, session)
    session.block()
    answers = [Answer() for _ in range(4)]
    for i, answer in enumerate(answers[:3]):
        send(model, answer, Correlation(1, start=i == 0), x=x(1))
    session.wait_entered()
    send(model, answers[3], first(2), x=x(1))
    model.give_up(Unavailable("too late"))
    desk.until(lambda: all(a.count for a in answers))
    assert all(isinstance(a.result, Unavailable) for a in answers)
    session.gate.set()


# --- found -----------------------------------------------------------------------------------------------------------


def recurrent(
    names: dict[str, str], fn: Callable[[Arrays], Arrays], made: TensorSpec | None = None, **more: TensorSpec
) -> FakeSession:
    """x [N, 2] and states [N, 2] under these names -> y and states."""
    return FakeSession(
        {"x": spec("N", 2), **more} | {name: spec("N", 2) for name in names},
        {"y": spec("N", 2)} | {name: made or spec("N", 2) for name in names.values()},
        fn,
    )


def stepped(names: dict[str, str]) -> Callable[[Arrays], Arrays]:
    return lambda f: {"y": f["x"] * 1} | {o: f[i] + f["x"] for i, o in names.items()}


@pytest.mark.parametrize(
    ("fed", "made"),
    [("h", "hn"), ("state", "stateN"), ("cache", "next_cache"), ("h_in", "h_out"), ("past_k", "present_k"),
     ("prev_h", "h"), ("c", "new_c"), ("State", "state_next")],
)  # fmt: skip
def test_states_are_known_by_their_names(fed: str, made: str) -> None:
    names = {fed: made}
    states, _ = find(recurrent(names, stepped(names)), Layout({"x": 0, fed: 0}, {"y": 0, made: 0}, (1,)), {})
    assert [(s.input, s.output, s.initial.shape) for s in states] == [(fed, made, (1, 2))]


@pytest.mark.parametrize(
    ("session", "why"),
    [
        (recurrent({"h": "k"}, stepped({"h": "k"})), "no output has the name"),
        (recurrent({"h": "hn"}, stepped({"h": "hn"}), spec("N", 2, dtype=np.float64)), "no output has the name"),
        (recurrent({"h": "hn"}, stepped({"h": "hn"}), spec("N", 3)), "no output has the name"),
        (recurrent({"h": "hn", "prev_h": "h_out"}, stepped({"h": "hn"})), "may belong to several states"),
        (recurrent({"h": "hn"}, lambda f: {"y": f["x"], "hn": f["h"]}), "'hn' is 'h' as it was fed"),
        (
            recurrent({"h": "hn"}, lambda f: {"y": f["x"], "hn": np.full_like(f["h"], np.nan)}),
            "'hn' is not finite where 'h' is zero",
        ),
        (
            recurrent({"h": "hn"}, lambda f: {"y": f["x"], "hn": f["x"][:, :1]}, spec("N", None)),
            "'hn' is [1, 1] where 'h' is [1, 2]",
        ),
        (recurrent({"h": "hn"}, lambda f: {"y": f["absent"]}), "the probe run failed: KeyError"),
        (
            FakeSession({"h": spec("N", 2)}, {"hn": spec("N", 2), "y": spec("N")}, lambda f: {}),
            "nothing but states goes in or comes out",
        ),
    ],
)
def test_what_is_no_state(session: FakeSession, why: str) -> None:
    layout = Layout(dict.fromkeys(session.inputs, 0), dict.fromkeys(session.outputs, 0), (1,))
    states, reason = find(session, layout, {})
    assert not states
    assert why in reason


def test_a_size_that_the_data_decides_is_no_states() -> None:
    """A mask that is handed through has the name and type of a state; its length is that of the text."""
    session = FakeSession(
        {"ids": spec("N", "T", dtype=np.int64), "mask": spec("N", "T", dtype=np.bool_)},
        {"y": spec("N"), "mask_out": spec("N", "T", dtype=np.bool_)},
        lambda f: {"y": f["ids"].sum(1), "mask_out": ~f["mask"]},
    )
    assert find(session, Layout({"ids": 0, "mask": 0}, {"y": 0, "mask_out": 0}, (1,)), {}) == (
        (),
        "no output has the name and type of an input",
    )


def test_it_is_found_when_it_is_its_turn_on_the_device(desk: Desk) -> None:
    session = summing()
    model = desk.open(session)
    held: list[bool] = []
    fn = session.fn

    def watched(feeds: Arrays) -> Arrays:
        held.append(model.batcher.turns.held_since is not None)
        return fn(feeds)

    session.fn = watched
    assert wrap(model) is not model
    assert held == [True, True]


def test_a_model_without_states_is_left_as_it_is(desk: Desk) -> None:
    model = desk.open(recurrent({"h": "k"}, stepped({"h": "k"})))
    assert wrap(model) is model


# --- declared --------------------------------------------------------------------------------------------------------


def config(text: str) -> Any:
    return text_format.Parse(text, message("inference.ModelConfig")())


def control(name: str, kind: str, values: str) -> str:
    return f"control_input {{ name: '{name}' control {{ kind: CONTROL_SEQUENCE_{kind} {values} }} }} "


STATE = "state { input_name: 'a' output_name: 'b' data_type: TYPE_FP32 dims: [2] } "


def controlled(kind: Any = np.float32) -> FakeSession:
    """x and state a [N, 2] -> b = a + x, and flags [N, 4]: what the control inputs said."""

    def fn(f: Arrays) -> Arrays:
        flags = np.stack([f[name][:, 0] for name in ("start", "ready", "end", "id")], 1)
        return {"b": f["a"] + f["x"], "flags": flags.astype(np.float64)}

    return FakeSession(
        {
            "x": spec("N", 2),
            "a": spec("N", 2),
            "start": spec("N", 1, dtype=np.int32),
            "ready": spec("N", 1, dtype=np.bool_),
            "end": spec("N", 1, dtype=np.float32),
            "id": spec("N", 1, dtype=np.int32),
        },
        {"b": spec("N", 2), "flags": spec("N", 4, dtype=np.float64)},
        fn,
    )


CONTROLS = (
    control("start", "START", "int32_false_true: [10, 11]")
    + control("ready", "READY", "bool_false_true: [false, true]")
    + control("end", "END", "fp32_false_true: [-1, 0.5]")
    + control("id", "CORRID", "data_type: TYPE_INT32")
)


def test_controls_say_where_a_step_is(desk: Desk) -> None:
    text = f"max_batch_size: 8 sequence_batching {{ {STATE + CONTROLS} }} output {{ name: 'b' }}"
    model = wrap(desk.open(controlled()), config(text))
    assert list(model.signature.inputs) == ["x"]
    assert list(model.signature.outputs) == ["b", "flags"]
    identity = (1 << 40) + 5  # cut to the low-order 32 bits
    said = [desk.ask(model, c, x=x(2)) for c in (first(identity), then(identity), last(identity))]
    np.testing.assert_array_equal([s["flags"][0] for s in said], [[11, 1, -1, 5], [10, 1, -1, 5], [10, 1, 0.5, 5]])
    assert [s["b"][0, 0] for s in said] == [2, 4, 6]
    with pytest.raises(BadRequest, match="takes integers as sequence ids, not 'abc'"):
        desk.ask(model, first("abc"), x=x(2))
    with pytest.raises(BadRequest, match="must specify a non-zero or non-empty correlation ID"):
        desk.ask(model, x=x(2))
    with pytest.raises(BadRequest, match="must specify batch-size 1 due to requirements of sequence batcher"):
        desk.ask(model, first(1), x=np.zeros((2, 2), np.float32))


def test_texts_are_identities_and_states_are_hidden(desk: Desk) -> None:
    session = FakeSession(
        {"x": spec("N", 2), "id": spec("N", 1, dtype=object), "a": spec("N", 2)},
        {"y": spec("N", 1, dtype=object), "b": spec("N", 2)},
        lambda f: {"y": f["id"], "b": f["a"]},
    )
    text = STATE + control("id", "CORRID", "data_type: TYPE_STRING")
    model = wrap(desk.open(session), config(f"max_batch_size: 8 sequence_batching {{ {text} }}"))
    assert list(model.signature.outputs) == ["y"]
    assert [desk.ask(model, first(i), x=x(1))["y"][0, 0] for i in ("abc", 7)] == ["abc", "7"]


def test_an_initial_state_comes_from_a_file(desk: Desk) -> None:
    initial = "initial_state { name: 'i' data_type: TYPE_FP32 dims: [2] data_file: 'start.bin' }"
    state = STATE.replace("dims: [2] }", f"dims: [2] {initial} }}")
    text = f"max_batch_size: 8 sequence_batching {{ {state} {CONTROLS} }}"
    files = {"start.bin": np.array([5, 6], np.float32).tobytes()}
    model = wrap(desk.open(controlled()), config(text + "output { name: 'b' }"), read=files.__getitem__)
    np.testing.assert_array_equal(desk.ask(model, first(), x=x(1))["b"], [[6, 7]])
    with pytest.raises(ConfigError, match="has no folder"):
        wrap(desk.open(controlled()), config(text))
    files["start.bin"] = b"1234"
    with pytest.raises(ConfigError, match="too short for the initial state of 'a'"):
        wrap(desk.open(controlled()), config(text), read=files.__getitem__)


@pytest.mark.parametrize(
    "strategy",
    [
        "max_batch_size: 2 sequence_batching { direct { }",
        "max_batch_size: 8 sequence_batching { oldest { max_candidate_sequences: 2 }",
    ],
)
def test_sequences_over_the_strategys_limit_wait_for_one_to_end(desk: Desk, strategy: str) -> None:
    model = wrap(desk.open(controlled()), config(f"{strategy} {STATE + CONTROLS} }} output {{ name: 'b' }}"))
    assert isinstance(model, SequenceModel)
    for identity in (1, 2):
        desk.ask(model, first(identity), x=x(1))
    waits = [Answer() for _ in range(3)]
    for correlation, answer in zip((first(3), last(3), first(4)), waits, strict=True):
        send(model, answer, correlation, x=x(1))
    assert desk.ask(model, then(1), x=x(1))["b"][0, 0] == 2
    assert (model.waiting, [a.count for a in waits]) == (3, [0, 0, 0])
    desk.ask(model, last(2), x=x(1))
    desk.until(lambda: all(a.count for a in waits))
    assert [a["b"][0, 0] for a in waits] == [1, 2, 1]


def test_a_sequence_that_waits_for_its_turn_expires_whole_or_runs_at_the_end(desk: Desk) -> None:
    model = wrap(
        desk.open(controlled()),
        config(f"max_batch_size: 1 sequence_batching {{ {STATE + CONTROLS} }} output {{ name: 'b' }}"),
    )
    assert isinstance(model, SequenceModel)
    desk.ask(model, first(1), x=x(1))
    late, behind, patient = (Answer() for _ in range(3))
    send(model, late, first(2), x=x(1), timeout=0.001)
    send(model, behind, then(2), x=x(1))
    send(model, patient, first(3), x=x(1))
    now = model.clock()
    model.clock = lambda: now + 0.01
    model.expire()
    assert all(isinstance(a.result, Expired) for a in (late, behind))
    assert (model.sequences, patient.count) == (2, 0)
    model.drain()
    desk.until(lambda: patient.count > 0)
    assert patient["b"][0, 0] == 1


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (STATE.replace("'a'", "'z'"), "state input 'z' of model 'm' is none of its inputs"),
        (STATE.replace("'b'", "'z'"), "state output 'z' of model 'm' is none of its outputs"),
        (STATE.replace("FP32", "INT8"), "state input 'a' of model 'm' is FP32 in the model"),
        (STATE.replace("[2]", "[3]"), r"state input 'a' of model 'm' is \[-1, 2\] in the model"),
        (STATE.replace("data_type: TYPE_FP32", ""), "must specify 'data_type'"),
        (STATE + STATE, "State input name 'a' specified more than once."),
        (control("z", "START", "int32_false_true: [0, 1]"), "control tensor 'z' is no input of 'm'"),
        (control("start", "START", "bool_false_true: [false, true]"), "control 'start' of model 'm' is INT32"),
        (control("start", "START", ""), "must specify either 'int32_false_true', 'fp32_false_true' or"),
        (control("start", "START", "int32_false_true: [0]"), "'int32_false_true' must have exactly 2 entries for"),
        (
            control("start", "START", "int32_false_true: [0, 1] fp32_false_true: [0, 1]"),
            "specifies more than one from 'int32_false_true'",
        ),
        (
            control("start", "START", "int32_false_true: [0, 1]") * 2,
            "specifies multiple CONTROL_SEQUENCE_START tensors",
        ),
        (control("id", "CORRID", "data_type: TYPE_FP32"), "unexpected data type for control CONTROL_SEQUENCE_CORRID"),
        (control("id", "CORRID", "int32_false_true: [0, 1]"), "must not specify either 'int32_false_true'"),
        ("oldest { preferred_batch_size: 9 }", "preferred batch size must be <= max batch size"),
        ("oldest { preferred_batch_size: 0 }", "preferred batch size must be positive"),
        *(
            (STATE.replace("dims: [2]", f"dims: [2] initial_state {{ name: 'i' {initial} zero_data: true }}"), why)
            for initial, why in (
                ("data_type: TYPE_INT8 dims: [2]", "does not match the state data type"),
                ("data_type: TYPE_FP32 dims: [2, 1]", "doesn't match the size of 'state' dimensions .* 2 != 1"),
                ("data_type: TYPE_FP32 dims: [-1]", "contains variable dimensions"),
                ("data_type: TYPE_FP32 dims: [3]", "doesn't match 'state' dim description. 3 != 2"),
            )
        ),
    ],
)
def test_configurations_that_cannot_be(desk: Desk, text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        wrap(desk.open(controlled()), config(f"max_batch_size: 8 sequence_batching {{ {text} }}"))


def test_what_has_no_effect_is_named() -> None:
    text = "direct { minimum_slot_utilization: 0.5 } iterative_sequence: true state { use_growable_memory: true }"
    assert [line.partition(":")[0] for line in ignored_in_sequences(config(f"sequence_batching {{ {text} }}"))] == [
        "sequence_batching.direct.minimum_slot_utilization",
        "sequence_batching.state.use_growable_memory",
        "sequence_batching.iterative_sequence",
    ]
    assert not ignored_in_sequences(config("sequence_batching { oldest { max_candidate_sequences: 3 } }"))


# --- everything at once ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_whatever_happens_states_are_those_of_the_steps_that_were_answered(desk: Desk, seed: int) -> None:
    """Steps at random, some of which fail, are cancelled or expire, while runs are held up now and then."""
    rng = np.random.default_rng(seed)
    session = summing()
    model = sequences(desk, session) if seed % 2 else bounded(desk, session)
    sent: dict[int, list[tuple[Correlation, float, Answer, Job]]] = {i: [] for i in (1, 2, 3, 4)}
    for _ in range(150):
        identity, what = int(rng.integers(1, 5)), rng.random()
        if what < 0.7:
            correlation = Correlation(identity, bool(rng.random() < 0.3), bool(rng.random() < 0.15))
            value, answer = float(rng.integers(1, 9)) if rng.random() < 0.9 else -1.0, Answer()
            timeout = 1e-6 if rng.random() < 0.05 else None
            try:
                job = send(model, answer, correlation, timeout=timeout, x=x(value))
            except RequestError:
                continue
            sent[identity].append((correlation, value, answer, job))
        elif what < 0.8 and sent[identity]:
            model.cancel(sent[identity][int(rng.integers(len(sent[identity])))][3])
        elif what < 0.85:
            session.gate.clear()
        elif what < 0.9:
            session.gate.set()
            model.expire()
        while not desk.posted.empty():
            fn, argument = desk.posted.get()
            fn(argument)
    session.gate.set()
    model.drain()
    everything = [step for steps in sent.values() for step in steps]
    desk.until(lambda: all(a.count or job.state is JobState.CANCELLED for _, _, a, job in everything))
    assert model.waiting == 0
    assert model.join(WAIT)
    for steps in sent.values():
        total = 0.0
        for correlation, value, answer, job in steps:
            assert answer.count == (job.state is not JobState.CANCELLED)
            if answer.count and not isinstance(answer.result, Exception):
                total = value + (0.0 if correlation.start else total)
                assert answer["y"][0, 0] == total
            else:
                assert value == -1 or isinstance(answer.result, RequestError | None)
    kept = [s.state for s in model._sequences.values()]
    assert model.state_bytes == sum(a.nbytes for state in kept if state is not None for a in state.values())
    assert all(state is not None for state in kept)
    assert model._running == model._sequences.keys()


def bounded(desk: Desk, session: FakeSession) -> SequenceModel:
    """At most two sequences are under way."""
    text = "max_batch_size: 8 sequence_batching { oldest { max_candidate_sequences: 2 } state { input_name: 'sum' "
    model = wrap(
        desk.open(session), config(text + "output_name: 'sum_out' data_type: TYPE_FP32 dims: [2] } }"), Limits()
    )
    assert isinstance(model, SequenceModel)
    return model


def test_an_answered_step_leaves_nothing_to_collect(desk: Desk) -> None:
    model = sequences(desk, summing())
    for correlation in (first(), then(), last()):
        assert leaves_nothing(lambda answer, c=correlation: send(model, answer, c, x=x(1)), desk.until)  # type: ignore[misc]
