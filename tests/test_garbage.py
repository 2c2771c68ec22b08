"""What loading and planning do to Python's garbage collection, which the whole process shares."""

from __future__ import annotations

import subprocess
import sys

import pytest

LOAD = """
import gc
import infera_gpu
from tests.text import parse
nodes = "".join(f"v{i + 1} = Exp(v{i}) " for i in range(300))
model = parse("g (float[N] v0) => (float[N] v300) { " + nodes + "}")
BEFORE
looked = []
gc.callbacks.append(lambda phase, info: looked.append(info["generation"]) if phase == "start" else None)
session = infera_gpu.load(model, device="cpu")
held = [[] for _ in range(gc.get_threshold()[0] // 2)]
print(gc.isenabled(), len(looked), gc.get_freeze_count() > 0)
"""


def loaded(before: str, after: str = "") -> list[str]:
    """Whether collection is on after a load and what comes `after`, how many there were by then, and whether objects
    are frozen."""
    work = LOAD.replace("BEFORE", before).replace("held =", f"{after}\nheld =")
    done = subprocess.run([sys.executable, "-c", work], capture_output=True, text=True, check=True)
    return done.stdout.split()


RUN = "session.run({'v0': numpy.ones(4, 'f4')})"


def test_what_the_first_load_and_the_first_run_make_is_not_looked_at() -> None:
    assert loaded("") == ["True", "0", "False"]
    assert loaded("import numpy", RUN) == ["True", "0", "False"]


def test_what_later_runs_plan_is_left_to_the_collector() -> None:
    assert int(loaded("import numpy", f"{RUN}; {RUN.replace('4', '5', 1)}")[1]) > 0


@pytest.mark.parametrize("before", ["gc.freeze()", "infera_gpu.load(model, device='cpu'); gc.freeze()"])
def test_what_is_frozen_stays_frozen(before: str) -> None:
    assert loaded(before)[::2] == ["True", "True"]


def test_later_loads_leave_the_young_to_the_collector() -> None:
    assert int(loaded("infera_gpu.load(model, device='cpu'); gc.collect()")[1]) > 0


def test_collection_that_is_off_stays_off() -> None:
    assert loaded("gc.disable()") == ["False", "0", "False"]
