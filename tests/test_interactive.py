"""What people do with a session at a prompt: show a plan, copy a session, call it as onnxruntime is called, name a
model as on the command line."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import numpy as np
import pytest

import infera_gpu
from infera_gpu.errors import InputError, InvalidModel
from infera_gpu.session import Session
from tests.text import parse

X = np.ones((3, 4), np.float32)


@pytest.fixture
def session() -> Session:
    return infera_gpu.load(parse("g (float[N, 4] x) => (float[N, 4] y) { y = Softmax(x) }"), device="cpu", threads=1)


def test_a_prompt_shows_a_plan_as_its_table(session: Session) -> None:
    plan = session.plan_for({"x": X})
    assert repr(plan) == str(plan)
    assert repr(plan.steps) == f"(<Softmax 'y' via {plan.steps[0].via}>,)"


@pytest.mark.parametrize("copied", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_session_that_is_pickled_or_copied_says_what_to_do(
    session: Session, copied: Callable[[Session], object]
) -> None:
    with pytest.raises(TypeError, match=f"load '{session.name}' again"):
        copied(session)


def test_feeds_where_onnxruntime_has_them_are_not_taken_for_outputs(session: Session) -> None:
    with pytest.raises(InputError, match=r"not NoneType; .* infera_gpu\.InferenceSession"):
        session.run(None, {"x": X})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("named", "hint"),
    [
        ("https://example.org/m.onnx", "fetch, in infera_gpu.fetch"),
        ("pypi://magika==1.0/m.onnx", "fetch, in infera_gpu.fetch"),
        ("no-such-name", "fetch, in infera_gpu.fetch"),
        ("~/no-such-model.onnx", "os.path.expanduser"),
    ],
)
def test_what_only_the_command_line_takes_for_a_model_is_told(named: str, hint: str) -> None:
    with pytest.raises(InvalidModel, match=f"No such file or directory; .*{hint}"):
        infera_gpu.load(named, device="cpu")
