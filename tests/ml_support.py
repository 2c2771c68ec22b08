"""Models of one ai.onnx.ml operator, here and in onnxruntime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper

import infera_gpu
from infera_gpu.spec import onnx_of_dtype
from tests.cases import assert_close
from tests.protos import attributes


def both(
    op: str, since: int, attrs: dict[str, Any], x: np.ndarray, outs: Sequence[int], **instead: Any
) -> list[tuple[Any, Any]]:
    """Pairs of what comes out here and from onnxruntime without optimisations, which gets `instead` of some attributes.

    `outs` are the types of the outputs.
    """
    names = [f"out{i}" for i in range(len(outs))]
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads, options.log_severity_level = 1, 4

    def model(attrs: dict[str, Any]) -> onnx.ModelProto:
        graph = helper.make_graph(
            [helper.make_node(op, ["x"], names, domain="ai.onnx.ml", **attributes(attrs))],
            "random",
            [helper.make_tensor_value_info("x", onnx_of_dtype(x.dtype), x.shape)],
            [helper.make_tensor_value_info(n, t, None) for n, t in zip(names, outs, strict=True)],
        )
        opsets = [helper.make_opsetid("ai.onnx.ml", since), helper.make_opsetid("", 17)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)

    given = model({**attrs, **instead}).SerializeToString()
    want = onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    got = infera_gpu.load(model(attrs), device="cpu").run({"x": x})
    return list(zip((got[n] for n in names), want, strict=True))


def same_scores(got: np.ndarray, want: np.ndarray, post: str) -> None:
    if post == "SOFTMAX_ZERO":  # a row of zeros stays so, as the name says; onnxruntime divides 0 by 0
        empty = np.isnan(want).all(axis=1)
        assert not got[empty].any()
        want = np.where(empty[:, None], got, want)
    assert_close(got, want, 1e-5, "scores")


def same_targets(got: np.ndarray, want: np.ndarray, post: str) -> None:
    """Outputs of a regressor. onnxruntime transforms a single target by PROBIT alone; ai.onnx.ml says by any."""
    if want.shape[1] == 1 and post != "PROBIT":
        transforms: dict[str, Callable[[], np.ndarray]] = {
            "NONE": lambda: want,
            "SOFTMAX": lambda: np.ones_like(want),
            "LOGISTIC": lambda: (1 / (1 + np.exp(-want.astype(np.float64)))).astype(want.dtype),
            "SOFTMAX_ZERO": lambda: (want != 0).astype(want.dtype),
        }
        want = transforms[post]()
    same_scores(got, want, post)


def same_labels(got: np.ndarray, want: np.ndarray) -> None:
    assert got.dtype == want.dtype
    assert got.tolist() == want.tolist()
