"""NumPy's settings while plans run."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from infera_gpu.devices import base
from infera_gpu.devices.base import UFUNC_BUFFER, quiet_numpy
from infera_gpu.errors import OutOfMemoryError


@pytest.fixture(params=["the variable", "errstate"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "errstate":
        monkeypatch.setattr(base, "_settings", lambda: None)


def settings() -> tuple[dict[str, str], int]:
    return {name: str(how) for name, how in np.geterr().items()}, np.getbufsize()


@pytest.mark.usefixtures("_way")
def test_settings_hold_inside_alone() -> None:
    with np.errstate(over="raise"):
        before = settings()
        with quiet_numpy():
            assert settings() == (dict.fromkeys(before[0], "ignore"), UFUNC_BUFFER)
            np.float32(1e38) * np.float32(1e38)
            with quiet_numpy():
                pass
            assert np.getbufsize() == UFUNC_BUFFER
            elsewhere: list[int] = []
            thread = threading.Thread(target=lambda: elsewhere.append(np.getbufsize()))
            thread.start()
            thread.join()
            assert elsewhere != [UFUNC_BUFFER]
        assert settings() == before


@pytest.mark.usefixtures("_way")
def test_settings_come_back_after_a_failure() -> None:
    before = settings()
    with pytest.raises(OutOfMemoryError), quiet_numpy():
        raise MemoryError
    with pytest.raises(KeyError), quiet_numpy():
        raise KeyError
    assert settings() == before


def test_numpy_has_the_variable() -> None:
    """Where it has not, runs still work, but small ones take longer: find its new place."""
    assert base._settings() is not None
