"""Every operator of the default ONNX domain at every opset from 7 on: the attributes that its schema has, and results.

A declaration answers for all later opsets until the next one. Here ONNX's own schemas say whether it may.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import defs, helper, numpy_helper

import infera_gpu
from infera_gpu.op import REQUIRED, Case, Op
from infera_gpu.ops import registry
from infera_gpu.spec import spec_of
from tests import oracle, test_host_ops
from tests.cases import OLDEST, assert_close, compute, inputs_of, opset_of, site_of
from tests.text import parse

NEWEST = defs.onnx_opset_version()

TAKEN_APART = {"If": "specialising chooses a branch", "Constant": "the loader makes it a constant"}
"""Operators that no declaration answers for, and who does."""

DEPRECATED = {"GroupNormalization": (18, 20), "Scatter": (11, NEWEST), "Upsample": (10, NEWEST)}
"""Operators that run, as the schema says, at opsets (first, last) where ONNX has deprecated them."""

OTHER_DEFAULTS: dict[tuple[str, str], tuple[object, object]] = {
    ("RNN", "activations"): ([b"Tanh", b"Tanh"], None),  # one a direction, however many there are
    ("RotaryEmbedding", "num_heads"): (None, 0),
    ("SequenceEmpty", "dtype"): (None, 1),
}
"""(operator, attribute): the schema's default, and the declaration's, which means the same."""

LAST_ORACLE = {"GlobalLpPool": 21, "MaxRoiPool": 21, "Optional": 21}
"""The newest opset at which there is a right answer to compare with, which must hold later too.

onnxruntime has no later GlobalLpPool and MaxRoiPool, onnx's reference none at all, and its Optional makes a list.
"""

SCHEMAS: dict[str, list[defs.OpSchema]] = defaultdict(list)
for _schema in sorted(defs.get_all_schemas_with_history(), key=lambda s: s.since_version):
    if not _schema.domain:
        SCHEMAS[_schema.name].append(_schema)


def schemas(name: str) -> Iterator[tuple[int, defs.OpSchema]]:
    """(opset, what the operator is there) from opset 7 on."""
    for opset in range(OLDEST, NEWEST + 1):
        known = [s for s in SCHEMAS[name] if s.since_version <= opset]
        if known:
            yield opset, known[-1]


def default_of(attribute: defs.OpSchema.Attribute) -> object:
    """An optional attribute's default as declarations write it."""
    if not attribute.default_value.name:
        return None
    value: Any = onnx.helper.get_attribute_value(attribute.default_value)
    return value.decode() if isinstance(value, bytes) else value


def same(a: Any, b: Any) -> bool:
    """Equal, numbers up to float32."""
    if a is None or isinstance(a, str):
        return bool(a == b)
    return b is not None and np.array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.parametrize("name", sorted(SCHEMAS.keys() - TAKEN_APART.keys()))
def test_the_attributes_are_the_schemas(name: str) -> None:
    for opset, schema in schemas(name):
        where = f"{name} at opset {opset}"
        assert schema.support_level == defs.OpSchema.SupportType.COMMON, f"{where} is experimental"
        first, last = DEPRECATED.get(name, (0, -1))
        assert schema.deprecated == (first <= opset <= last), where
        op = registry().find("", name, opset)
        assert op is not None, f"{where} is not declared"
        assert op.attrs.keys() == schema.attributes.keys(), where
        required = {k for k, v in op.attrs.items() if v is REQUIRED}
        assert required == {k for k, v in schema.attributes.items() if v.required}, where
        for key in op.attrs.keys() - required:
            mine, theirs = op.attrs[key], default_of(schema.attributes[key])
            assert same(mine, theirs) or OTHER_DEFAULTS.get((name, key)) == (theirs, mine), f"{where}: {key}"


def test_every_declaration_has_a_schema() -> None:
    """SimplifiedLayerNormalization is onnxruntime's, which looks for it in ONNX's own domain."""
    assert {op.name for op in registry() if not op.domain} - SCHEMAS.keys() == {"SimplifiedLayerNormalization"}


def later(name: str, since: int) -> Iterator[int]:
    """Versions after `since` of an operator that are not its deprecation, and the newest opset."""
    yield from (s.since_version for s in SCHEMAS[name] if s.since_version > since and not s.deprecated)
    if since < NEWEST and not SCHEMAS[name][-1].deprecated:
        yield NEWEST


def served() -> Iterator[Any]:
    """Each declaration with each later version that it answers for, and the cases that are older."""
    for op in registry():
        found: dict[int, list[Case]] = defaultdict(list)
        for case in () if op.domain or op.name not in SCHEMAS else op.cases:
            for version in {*later(op.name, opset_of(op, case))}:
                if registry().find("", op.name, version) is op:
                    found[version].append(case)
        for version, cases in sorted(found.items()):
            yield pytest.param(op, version, cases, id=f"{op.qualified}-at-{version}")


@pytest.mark.parametrize(("op", "version", "cases"), [*served()])
@pytest.mark.filterwarnings("ignore::RuntimeWarning:onnx")
def test_cases_mean_the_same_at_later_versions(op: Op, version: int, cases: list[Case]) -> None:
    compare = compare_model if op.host else compare_site
    for case in cases:
        compare(op, replace(case, opset=version), replace(case, opset=min(version, LAST_ORACLE.get(op.name, NEWEST))))


def compare_site(op: Op, case: Case, asked: Case) -> None:
    """The case's outputs are as inferred, and what the oracle answers to `asked`."""
    ins = inputs_of(op, case)
    site = site_of(op, case, ins)
    got = compute(op, site, ins)
    specs = [spec_of(g) for g in got]
    for spec, inferred in zip(specs, op.infer(site), strict=False):
        assert inferred in (None, spec), case.id
    if op.pure:
        wants = oracle.oracle(op, asked, ins, specs)
        for i, (g, want) in enumerate(zip(got, wants, strict=False)):
            assert_close(np.asarray(g), want, case.tol, f"{case.id}: output {i}")


def compare_model(op: Op, case: Case, asked: Case) -> None:
    """The case as a model gives what the oracle answers to `asked`."""
    model, feeds = test_host_ops.model_of(op, case)
    with infera_gpu.load(model, device="cpu") as session:
        got = session.run(feeds)
    if op.pure:
        wants = test_host_ops.oracle(test_host_ops.model_of(op, asked)[0], feeds)
        for (name, g), want in zip(got.items(), wants, strict=True):
            test_host_ops.assert_same(g, want, case.tol, f"{case.id}: {name}")


@pytest.mark.parametrize("opset", range(OLDEST, NEWEST + 1))
@pytest.mark.parametrize("chosen", [True, False])
def test_a_branch_is_taken_at_every_opset(opset: int, chosen: bool) -> None:
    """If and Constant, which have no declaration of their own."""
    model = parse(
        """g (bool c, float[2] x) => (float[2] y) {
            two = Constant <value = float {2.0}> ()
            y = If (c) <
                then_branch = more () => (float[2] a) { a = Mul(x, two) },
                else_branch = less () => (float[2] b) { b = Div(x, two) }
            >
        }""",
        opset,
    )
    onnx.checker.check_model(model)
    x = np.array([3, -5], np.float32)
    with infera_gpu.load(model, device="cpu") as session:
        got = session.run({"c": np.array(chosen), "x": x})["y"]
    np.testing.assert_array_equal(got, x * 2 if chosen else x / 2)


SPARSE = helper.make_sparse_tensor(
    helper.make_tensor("values", onnx.TensorProto.FLOAT, [2], [5, -7]),
    helper.make_tensor("indices", onnx.TensorProto.INT64, [2], [1, 5]),
    [2, 3],
)
CONSTANTS: dict[str, tuple[Any, Any]] = {
    "sparse_value": (SPARSE, np.array([[0, 5, 0], [0, 0, -7]], np.float32)),
    "value": (numpy_helper.from_array(np.array([[1, 2]], np.int16)), np.array([[1, 2]], np.int16)),
    "value_float": (1.5, np.array(1.5, np.float32)),
    "value_floats": ([1.5, 2.0], np.array([1.5, 2], np.float32)),
    "value_int": (-3, np.array(-3)),
    "value_ints": ([1, -3], np.array([1, -3])),
    "value_string": ("a", np.array("a", object)),
    "value_strings": (["a", "b"], np.array(["a", "b"], object)),
}


@pytest.mark.parametrize("opset", range(OLDEST, NEWEST + 1))
def test_the_loader_knows_every_attribute_of_a_constant(opset: int) -> None:
    (schema,) = (s for v, s in schemas("Constant") if v == opset)
    assert schema.attributes.keys() <= CONSTANTS.keys()
    for name in schema.attributes:
        given, want = CONSTANTS[name]
        graph = helper.make_graph(
            [helper.make_node("Constant", [], ["c"], **{name: given}), helper.make_node("Identity", ["c"], ["y"])],
            "constant",
            [],
            [helper.make_empty_tensor_value_info("y")],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
        with infera_gpu.load(model, device="cpu") as session:
            assert_close(session.run({})["y"], want, 0, name)
