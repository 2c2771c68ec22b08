"""The networks that GPU rows are timed against, in PyTorch on the CPU: they answer what the models answer."""

from __future__ import annotations

import numpy as np
import pytest

import infera_gpu
from bench.build import resnet50
from bench.gpu_models import images

torch = pytest.importorskip("torch")


def test_resnet50_has_its_norms_folded() -> None:
    from bench.torch_peers import torch_resnet50

    model, feeds = resnet50(), images(1)
    module = torch_resnet50(model)
    assert not any(isinstance(part, torch.nn.BatchNorm2d) for part in module.modules())
    (want,) = infera_gpu.load(model, device="cpu").run(feeds).values()
    with torch.inference_mode():
        got = module(torch.tensor(feeds["image"])).numpy()
    assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()
