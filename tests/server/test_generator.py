"""Decoders that generate: token by token as by the book, stopped, sampled, in shared batches, and refused at load."""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from websockets.sync.client import connect

from infera_server.errors import BadRequest
from infera_server.models.discovery import survey
from infera_server.models.repository import Repository
from infera_server.pipelines.generator import Generator
from infera_server.pipelines.sampling import Sampler, Sampling, sampling
from infera_server.scheduling.rows import HostArray
from infera_server.settings import Settings
from tests.server.decoders import (
    ATTENTION,
    MASKED,
    RECURRENT,
    STATELESS,
    WIDTH,
    WORDS,
    attention_logits,
    put_decoder,
    recurrent_logits,
    recurrent_state,
)
from tests.server.grpc_cases import call, infer, tensor
from tests.server.grpc_cases import request as message_of
from tests.server.grpc_stream_cases import ENDS, talk
from tests.server.grpc_support import channel, stream
from tests.server.support import WAIT, Running, hosting, until

DECOUPLED = "model_transaction_policy { decoupled: true }"
MOST = 20


def config(tokens: str, *more: str, **parameters: str) -> str:
    given = {"generate_input": tokens, "generate_max_tokens": str(MOST), **parameters}
    entries = [f'parameters {{ key: "{k}" value {{ string_value: "{v}" }} }}' for k, v in given.items()]
    return "\n".join([*entries, *more])


Logits = Callable[[Sequence[int]], HostArray]
LOGITS: dict[str, Logits] = {
    "attention": attention_logits,
    "stateless": attention_logits,
    "recurrent": recurrent_logits,
}


def by_the_book(logits: Logits, prompt: Sequence[int], count: int = MOST) -> list[int]:
    text = list(prompt)
    for _ in range(count):
        text.append(int(logits(text).argmax()))
    return text[len(prompt) :]


PROMPT = [3, 1, 4, 1, 5]
STOP = by_the_book(attention_logits, PROMPT)[6]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    root = tmp_path_factory.mktemp("models")
    put_decoder(root, "attention", ATTENTION, config("input_ids", DECOUPLED))
    put_decoder(root, "whole", ATTENTION, config("input_ids"))
    put_decoder(root, "stops", ATTENTION, config("input_ids", DECOUPLED, generate_stop=f"{STOP}, 99"))
    put_decoder(root, "masked", MASKED, config("input_ids", DECOUPLED, generate_max_tokens="45"))
    put_decoder(root, "stateless", STATELESS, config("input_ids", DECOUPLED))
    put_decoder(root, "recurrent", RECURRENT, config("token", DECOUPLED))
    repository = Repository(Settings(golden_requests=4), survey([root]).sources)
    with hosting(repository) as running:
        assert set(running.index().values()) == {"READY"}
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[grpc.Channel]:
    with channel(server) as made:
        yield made


def ask(model: str, prompt: Sequence[int], **more: Any) -> Any:
    name = "token" if model == "recurrent" else "input_ids"
    entry = tensor((1, len(prompt)), name=name, datatype="INT64")
    return infer([entry], [np.array(prompt, np.int64).tobytes()], model_name=model, **more)


def tokens_of(responses: Sequence[Any]) -> list[int]:
    found: list[int] = []
    for response in responses:
        for raw in response["infer_response"].get("raw_output_contents", ()):
            found += np.frombuffer(base64.b64decode(raw), np.int64).tolist()
    return found


def finals(responses: Sequence[Any]) -> list[bool]:
    return [r["infer_response"]["parameters"]["triton_final_response"]["bool_param"] for r in responses]


# --- as by the book --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "logits"), LOGITS.items())
def test_tokens_are_those_of_the_whole_text_again(client: grpc.Channel, model: str, logits: Logits) -> None:
    for prompt in (PROMPT, [7]):
        responses = talk(client, [ask(model, prompt, id="a")])
        assert tokens_of(responses) == by_the_book(logits, prompt)
        assert finals(responses) == [False] * (MOST - 1) + [True]
        assert {tuple(r["infer_response"]["outputs"][0]["shape"]) for r in responses} == {("1", "1")}


def test_a_text_may_begin_from_a_state(client: grpc.Channel) -> None:
    """As a decoder does from what its encoder made of something else."""
    first, rest = PROMPT[:3], PROMPT[3:]
    hidden = recurrent_state(first).tobytes()
    entries = [
        tensor((1, len(rest)), name="token", datatype="INT64"),
        tensor((1, WIDTH), name="hidden", datatype="FP32"),
    ]
    asked = infer(entries, [np.array(rest, np.int64).tobytes(), hidden], model_name="recurrent")
    assert tokens_of(talk(client, [asked])) == by_the_book(recurrent_logits, PROMPT)


def test_fewer_are_made_where_fewer_are_asked_for(client: grpc.Channel) -> None:
    for asked, count in ((3, 3), (1, 1), (1000, MOST)):
        responses = talk(client, [ask("attention", PROMPT, parameters={"max_tokens": {"int64_param": str(asked)}})])
        assert tokens_of(responses) == by_the_book(attention_logits, PROMPT, count)


def test_a_stop_ends_the_text_and_is_not_told(client: grpc.Channel) -> None:
    want = by_the_book(attention_logits, PROMPT)[: by_the_book(attention_logits, PROMPT).index(STOP)]
    responses = talk(client, [ask("stops", PROMPT)])
    assert (tokens_of(responses), any(finals(responses))) == (want, False)
    responses = talk(client, [ask("stops", PROMPT, parameters=ENDS)])
    assert (tokens_of(responses), finals(responses)) == (want, [False] * len(want) + [True])


def test_a_trace_has_the_text_queued_when_it_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pause, ran = 0.01, Generator._ran

    def slowly(*arguments: Any) -> None:
        time.sleep(pause)
        ran(*arguments)

    monkeypatch.setattr(Generator, "_ran", slowly)
    put_decoder(tmp_path, "whole", ATTENTION, config("input_ids"))
    repository = Repository(Settings(trace_file=tmp_path / "trace"), survey([tmp_path]).sources)
    with hosting(repository) as running, channel(running) as made:
        level = json.dumps({"trace_level": ["TIMESTAMPS"], "trace_rate": "1"}).encode()
        running.request("POST", "/v2/trace/setting", level)
        assert tokens_of(talk(made, [ask("whole", PROMPT)])) == by_the_book(attention_logits, PROMPT)
    _, stamps = json.loads((tmp_path / "trace").read_bytes())
    at = {t["name"]: t["ns"] / 1e9 for t in stamps["timestamps"]}
    assert at["REQUEST_START"] == at["QUEUE_START"]
    assert at["HTTP_RECV_START"] <= at["QUEUE_START"] <= at["COMPUTE_START"] - (MOST - 1) * pause


def responses_of(running: Running, model: str) -> dict[str, dict[str, int]]:
    """How many there were at each place, by what came of them."""
    (found,) = running.get(f"/v2/models/{model}/stats")[1]["model_stats"]
    return {i: {n: t["count"] for n, t in times.items() if t["count"]} for i, times in found["response_stats"].items()}


def test_responses_are_counted_by_their_place(tmp_path: Path) -> None:
    want = by_the_book(attention_logits, PROMPT)[: by_the_book(attention_logits, PROMPT).index(STOP)]
    put_decoder(tmp_path, "m", ATTENTION, config("input_ids", DECOUPLED, generate_stop=str(STOP)))
    put_decoder(tmp_path, "whole", ATTENTION, config("input_ids"))
    with hosting(Repository(Settings(), survey([tmp_path]).sources)) as running, channel(running) as made:
        for _ in range(2):
            talk(made, [ask("m", PROMPT)])
        told = {str(i): {"compute_infer": 2, "compute_output": 2, "success": 2} for i in range(len(want))}
        assert responses_of(running, "m") == told | {str(len(want)): {"empty_response": 2}}
        (found,) = call(made, "ModelStatistics", message_of("ModelStatisticsRequest", name="m")).message["model_stats"]
        assert found["response_stats"]["0"]["success"]["count"] == "2"
        assert int(found["response_stats"]["0"]["success"]["ns"]) > 0
        running.request("POST", "/v2/models/whole/generate", json.dumps({"input_ids": PROMPT}))
        assert responses_of(running, "whole") == {}


def test_events_and_whole_texts(server: Running) -> None:
    document = json.dumps({"input_ids": PROMPT, "max_tokens": 4, "id": "q"})
    want = by_the_book(attention_logits, PROMPT, 4)
    _, _, body = server.request("POST", "/v2/models/attention/generate_stream", document)
    events = [json.loads(event.removeprefix(b"data: ")) for event in body.split(b"\n\n") if event]
    names = {"id": "q", "model_name": "attention", "model_version": "1"}
    assert events == [{**names, "tokens": token} for token in want]
    _, _, body = server.request("POST", "/v2/models/whole/generate", document)
    assert json.loads(body)["tokens"] == want
    inputs = [{"name": "input_ids", "datatype": "INT64", "shape": [1, 5], "data": PROMPT}]
    _, reply = server.infer("whole", {"inputs": inputs, "parameters": {"max_tokens": 4}})
    assert reply["outputs"] == [{"name": "tokens", "datatype": "INT64", "shape": [1, 4], "data": want}]
    assert server.infer("attention", {"inputs": inputs})[0] == 501
    metadata = server.get("/v2/models/whole")[1]
    assert metadata["inputs"] == [{"name": "input_ids", "datatype": "INT64", "shape": [1, -1]}]
    assert server.get("/v2/models/attention/config")[1]["model_transaction_policy"] == {"decoupled": True}


def test_every_response_explains_itself_where_asked(server: Running, client: grpc.Channel) -> None:
    """By its own run: what came before it in the text was waited for by nobody."""
    most = {"max_tokens": 4}
    document = json.dumps({"input_ids": PROMPT, **most})
    began = time.monotonic()
    _, _, body = server.request("POST", "/v2/models/attention/generate_stream", document, {"infera-trace": "true"})
    told = [json.loads(event.removeprefix(b"data: "))["infera_trace"] for event in body.split(b"\n\n") if event]
    asks = {"infera_trace": {"bool_param": True}}
    few = {"max_tokens": {"int64_param": "4"}}
    responses = talk(client, [ask("attention", PROMPT, parameters=asks | few)])
    inputs = [{"name": "input_ids", "datatype": "INT64", "shape": [1, 5], "data": PROMPT}]
    with connect(f"ws://{server.address}/v2/models/attention/stream") as socket:
        socket.send(json.dumps({"inputs": inputs, "parameters": most | {"infera_trace": True}}))
        messages = [json.loads(socket.recv(WAIT))["parameters"] for _ in range(4)]
    took = (time.monotonic() - began) * 1e3
    assert [message["triton_final_response"] for message in messages] == [False, False, False, True]
    told += [r["infer_response"]["parameters"]["infera_trace"]["string_param"] for r in responses]
    told += [message["infera_trace"] for message in messages]
    assert len(told) == 12
    spent = 0.0
    for text in told:
        found = re.match(r"queued=([0-9.]+), .*requests=1, rows=1, .*ran=([0-9.]+)", text)
        assert found, text
        spent += float(found[1]) + float(found[2])
    assert spent <= took
    assert finals(responses) == [False, False, False, True]


def test_an_end_without_tokens_explains_itself_too(client: grpc.Channel) -> None:
    asks = {"infera_trace": {"bool_param": True}}
    last = talk(client, [ask("stops", PROMPT, parameters=asks | ENDS)])[-1]["infer_response"]
    assert "outputs" not in last
    assert "rows=1" in last["parameters"]["infera_trace"]["string_param"]
    (refused,) = talk(client, [ask("attention", [], parameters=asks)])
    assert refused["infer_response"]["parameters"]["infera_trace"]["string_param"] == 'refused="no run"'


# --- together --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["masked", "recurrent"])
def test_texts_share_batches_and_are_not_mixed_up(server: Running, client: grpc.Channel, model: str) -> None:
    """Also those of unequal lengths, where a mask hides what is between them."""
    prompts = [[(n + i * i) % WORDS for i in range(1 + n % 4)] for n in range(8)]
    stats = server.host.repository.get(model).stats
    for _ in range(5):  # on a busy machine they may come one by one
        responses = talk(client, [ask(model, prompt, id=str(n)) for n, prompt in enumerate(prompts)])
        for n, prompt in enumerate(prompts):
            own = [r for r in responses if r["infer_response"]["id"] == str(n)]
            logits, count = (attention_logits, 45) if model == "masked" else (recurrent_logits, MOST)
            assert tokens_of(own) == by_the_book(logits, prompt, count)
        if max(stats.batches) >= 4:
            break
    assert max(stats.batches) >= 4


def test_what_grows_is_padded_where_a_mask_hides_it(server: Running) -> None:
    masked, plain = (server.host.repository.get(name) for name in ("masked", "attention"))
    assert isinstance(masked, Generator)
    assert isinstance(plain, Generator)
    assert (masked.how.padded, plain.how.padded) == (True, False)
    present = {f"present_{part}": np.ones((1, 33, WIDTH), np.float32) for part in ("key", "value")}
    for past, length in ((1, 32), (32, 32), (33, 40)):
        state, padding = masked.how.next_state(present, past)
        assert (state["past_key"].shape, padding) == ((1, length, WIDTH), length - past)


def test_nothing_is_left_behind(server: Running, client: grpc.Channel) -> None:
    generator = server.host.repository.get("attention")
    assert isinstance(generator, Generator)
    talk(client, [ask("attention", PROMPT), ask("attention", [])])
    assert (generator.stats.sequences, generator.state_bytes) == ((0, 0), 0)


def test_the_states_of_all_texts_have_a_limit(tmp_path: Path) -> None:
    put_decoder(tmp_path, "attention", ATTENTION, config("input_ids", DECOUPLED))
    most = 2 * 4 * WIDTH * 10  # ten tokens
    with (
        hosting(Repository(Settings(max_sequence_bytes=most), survey([tmp_path]).sources)) as running,
        channel(running) as made,
    ):
        responses = talk(made, [ask("attention", PROMPT)])
        assert tokens_of(responses[:-1]) == by_the_book(attention_logits, PROMPT, 6)
        assert "1 texts under way" in responses[-1]["error_message"]
        generator = running.host.repository.get("attention")
        until(lambda: generator.stats.sequences == (0, 0))


def test_a_client_that_leaves_ends_its_text(server: Running, client: grpc.Channel) -> None:
    generator = server.host.repository.get("attention")
    with server.model("attention").batcher.turns:  # nothing runs
        call = stream(client)(iter([ask("attention", PROMPT)]), timeout=WAIT)
        until(lambda: generator.stats.sequences == (1, 0))
        call.cancel()
        until(lambda: generator.stats.sequences == (0, 0))


def test_a_text_that_is_under_way_is_finished(tmp_path: Path) -> None:
    put_decoder(tmp_path, "attention", ATTENTION, config("input_ids", DECOUPLED))
    with hosting(Repository(Settings(), survey([tmp_path]).sources)) as running, channel(running) as made:
        generator = running.host.repository.get("attention")
        with running.model("attention").batcher.turns:
            call = stream(made)(iter([ask("attention", PROMPT)]), timeout=WAIT)
            until(lambda: generator.stats.sequences == (1, 0))
            running.loop.call_soon_threadsafe(generator.drain)
            (refused,) = talk(made, [ask("attention", PROMPT)])
            assert "shutting down" in refused["error_message"]
        assert len(list(call)) == MOST
        assert generator.join(WAIT)


# --- what is asked for -----------------------------------------------------------------------------------------------


def test_sampling_follows_softmax() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    sampler = Sampler(Sampling(1, temperature=1.0, seed=0))
    counts = np.bincount([sampler.choose(logits) for _ in range(20_000)], minlength=4) / 20_000
    np.testing.assert_allclose(counts, [0.5, 0.3, 0.15, 0.05], atol=0.015)
    few = Sampler(Sampling(1, temperature=1.0, top_k=2, seed=0))
    assert {few.choose(logits) for _ in range(1000)} == {0, 1}
    assert {Sampler(Sampling(1, 1.0, 0, 7)).choose(logits) for _ in range(20)} == {
        Sampler(Sampling(1, 1.0, 0, 7)).choose(logits)
    }
    assert Sampler(Sampling(1)).choose(logits) == 0


def test_what_is_asked_for_is_checked() -> None:
    assert sampling({}, 9) == Sampling(9)
    asked = sampling({"max_tokens": 3, "temperature": "0.5", "top_k": 4, "seed": 1, "mine": True}, 9)
    assert asked == Sampling(3, 0.5, 4, 1)
    for parameters in (
        {"max_tokens": 0}, {"max_tokens": 1.5}, {"temperature": -1}, {"temperature": "hot"}, {"top_k": -1},
        {"seed": True}, {"temperature": float("nan")}, {"seed": float("inf")},
    ):  # fmt: skip
        with pytest.raises(BadRequest, match=f"parameter '{next(iter(parameters))}' must be a"):
            sampling(parameters, 9)


def test_bad_requests_are_told(server: Running, client: grpc.Channel) -> None:
    two = infer(
        [tensor((2, 1), name="input_ids", datatype="INT64")], [np.zeros(2, np.int64).tobytes()], model_name="attention"
    )
    (rows,) = talk(client, [two])
    assert "unexpected shape for input 'input_ids'" in rows["error_message"]
    (none,) = talk(client, [ask("attention", [])])
    assert "must have one row of tokens, got [1, 0]" in none["error_message"]
    (word,) = talk(client, [ask("attention", [WORDS + 5])])
    assert "model 'attention'" in word["error_message"]
    assert finals([word]) == [True]


# --- at load ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("graph", "given", "text"),
    [
        (ATTENTION, config("tokens"), "'tokens' is no input [batch] or [batch, tokens] of integers"),
        (ATTENTION, config("input_ids", generate_logits="x"), "generate_logits: which of logits"),
        (ATTENTION, config("input_ids", generate_states="a:b"), "'a:b' is no input and output"),
        (ATTENTION, config("input_ids", generate_stop="x"), "generate_stop: 'x' is no list of numbers"),
        (ATTENTION, config("input_ids", "sequence_batching {}"), "neither sequence_batching nor a response cache"),
        (
            ATTENTION,
            config("input_ids", "response_cache { enable: true }"),
            "neither sequence_batching nor a response cache",
        ),
        (
            ATTENTION,
            config("input_ids", 'input { name: "input_ids" data_type: TYPE_INT64 dims: [-1, -1] }'),
            "cannot be listed",
        ),
        (
            ATTENTION,
            config("input_ids", generate_states="past_key:present_value,past_value:present_key"),
            "3 tokens in one run give other logits",
        ),
    ],
)
def test_what_cannot_generate_is_refused_at_load(tmp_path: Path, graph: str, given: str, text: str) -> None:
    put_decoder(tmp_path, "m", graph, given)
    repository = Repository(Settings(), survey([tmp_path]).sources)
    repository.load(lambda fn, arg: fn(arg))
    (entry,) = repository.entries()
    assert text in entry.reason
