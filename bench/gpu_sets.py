"""Rows of single operators: products, attention, convolutions, and what is bound by memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, cast

import numpy as np
import onnx

from bench.build import resnet50
from bench.gpu_models import images
from bench.gpu_peers import Feeds, Peer, Tensors, compiled
from bench.gpu_row_models import alone, drawn, model_of, node, weights_in
from bench.gpu_rows import Row
from infera_gpu.devices.recording import RecordingDevice
from infera_gpu.loader import load_graph
from infera_gpu.passes import Precision
from infera_gpu.session import Session
from infera_gpu.source import Source
from infera_gpu.specialize import Placed

HALF = np.float16
Made = tuple[onnx.ModelProto, Feeds]


def row(
    set_: str,
    name: str,
    make: Callable[[], Made],
    peers: Peer | Mapping[str, Peer],
    precision: Precision = "fp16",
    **facts: Any,
) -> Row:
    """A row of an operator; a peer alone is called "torch"."""
    return Row(set_, name, make, precision, peers if isinstance(peers, Mapping) else {"torch": peers}, facts=facts)


def _weights(torch: Any, source: Source) -> list[Any]:
    return [torch.tensor(w, device="cuda") for w in weights_in(cast(onnx.ModelProto, source))]


# ---- products

SQUARES = tuple((n, n, n) for n in (1024, 2048, 4096, 8192))
LAYERS = (
    *((128, 768, 768), (128, 3072, 768), (4096, 768, 768), (4096, 3072, 768), (4096, 768, 3072)),
    *((197, 768, 768), (6304, 768, 768), (6304, 3072, 768), (6304, 768, 3072)),
    *((512, 3072, 2048), (512, 8192, 2048), (512, 2048, 8192)),
    *((1, 8192, 2048), (16, 8192, 2048), (64, 8192, 2048)),
)
"""(M, N, K) of BERT-base at 128 and 4096 tokens, ViT-B/16 at 1 and 32 images, Llama 1B at 512 tokens and in steps."""
EPILOGUES = ((1024, 1024, 1024), (4096, 4096, 4096), (4096, 3072, 768), (6304, 3072, 768), (512, 8192, 2048))
EXACT: tuple[tuple[tuple[int, int, int], Precision], ...] = tuple(
    ((m, n, k), precision)
    for m, n, k in ((1024, 3072, 768), (4096, 4096, 4096))
    for precision in cast("tuple[Precision, ...]", ("fp32", "tf32"))
)


def _product(m: int, n: int, k: int, dtype: Any, *, fused: bool) -> Made:
    x = {"a": drawn((m, k), dtype)}
    weights = {"b": drawn((k, n), dtype, scale=k**-0.5)}
    if not fused:
        return model_of([node("MatMul", "a", "b")], x, weights, (m, n), dtype), x
    weights["bias"] = drawn((n,), dtype)
    nodes = [node("MatMul", "a", "b", output="t"), node("Add", "t", "bias", output="u"), node("Relu", "u")]
    return model_of(nodes, x, weights, (m, n), dtype), x


def _matmul(torch: Any, source: Source, given: Tensors) -> Callable[[], Any]:
    (b,) = _weights(torch, source)
    return partial(torch.matmul, given[0], b)


def _addmm_relu(torch: Any, source: Source, given: Tensors) -> Callable[[], Any]:
    """cuBLASLt's epilogue of bias and ReLU."""
    b, bias = _weights(torch, source)
    return partial(torch._addmm_activation, bias, given[0], b)


def products() -> list[Row]:
    """M x N x K against cuBLAS: float16, with bias and ReLU fused, and float32 exact and rounded to tf32."""
    made = [
        row("products", f"{m}x{n}x{k}", partial(_product, m, n, k, HALF, fused=False), _matmul)
        for m, n, k in (*SQUARES, *LAYERS)
    ]
    made += [
        row("products, fused", f"{m}x{n}x{k} bias relu", partial(_product, m, n, k, HALF, fused=True), _addmm_relu)
        for m, n, k in EPILOGUES
    ]
    made += [
        row("products", f"{m}x{n}x{k}", partial(_product, m, n, k, np.float32, fused=False), _matmul, precision)
        for (m, n, k), precision in EXACT
    ]
    return made


# ---- attention

TOKENS, WIDTH = 16384, 2048
LENGTHS = (128, 512, 2048, 8192, 16384)


def _attention(length: int, size: int, *, causal: bool) -> Made:
    shape = (TOKENS // length, WIDTH // size, length, size)
    inputs = {name: np.roll(drawn(shape, HALF), i, axis=-1) for i, name in enumerate("qkv")}
    made = node("Attention", *inputs, is_causal=int(causal), scale=size**-0.5)
    return model_of([made], inputs, {}, shape, HALF), inputs


BACKENDS = {"torch flash": "FLASH_ATTENTION", "torch cuDNN": "CUDNN_ATTENTION"}
"""By peer, as torch.nn.attention.SDPBackend names them. Flash attention there is the second, which has nothing that is
Hopper's own; cuDNN's has."""


def _attended(backend: str, causal: bool, torch: Any, source: Source, given: Tensors) -> Callable[[], Any]:
    attention = torch.nn.attention

    def call() -> Any:
        with attention.sdpa_kernel(getattr(attention.SDPBackend, backend)):
            return torch.nn.functional.scaled_dot_product_attention(*given, is_causal=causal)

    return call


def attentions() -> list[Row]:
    """Heads of 64 and 128, 16384 tokens of width 2048 in sequences of each length: flash attention's and cuDNN's."""
    return [
        row(
            "attention",
            f"d{size} {TOKENS // length}x{length}{' causal' if causal else ''}",
            partial(_attention, length, size, causal=causal),
            {name: partial(_attended, backend, causal) for name, backend in BACKENDS.items()},
        )
        for size in (64, 128)
        for length in LENGTHS
        for causal in (False, True)
    ]


# ---- convolutions

CONVOLUTION = "FusedConvNHWC"


@dataclass(frozen=True)
class Layer:
    """A convolution of a network's plan, and how often the network has it."""

    placed: Placed
    count: int

    def __str__(self) -> str:
        (n, *size, channels), (outputs, _, *kernel) = self.placed.site.spec(0).dims, self.placed.site.spec(1).dims
        stride = (self.placed.site.attrs["strides"] or (1,))[0]
        what = f"{'x'.join(map(str, kernel))}/{stride} -> {outputs}"
        more = [self.placed.site.attrs["activation"], "residual" if self.placed.site.has(3) else ""]
        return " ".join([f"{n}x{'x'.join(map(str, size))}x{channels}", what, *filter(None, more)])


@cache
def layers_of(batch: int) -> tuple[Layer, ...]:
    """The different convolutions of ResNet-50 in half precision, as plans have them."""
    with Session(load_graph(resnet50()), RecordingDevice(), precision="fp16") as session:
        steps = [s.placed for s in session.plan_for(images(batch)).steps if s.placed]
    found = [p for p in steps if p.op.name == CONVOLUTION]
    keys = [str(Layer(p, 1)) for p in found]
    counts = Counter(keys)
    first = dict(zip(reversed(keys), reversed(found), strict=True))
    return tuple(Layer(first[key], count) for key, count in counts.items())


def _cudnn(placed: Placed, torch: Any, source: Source, given: Tensors) -> Callable[[], Any]:
    """cuDNN's convolution with bias, and with residual and ReLU where the layer has them; images are channels-last."""
    attrs, site = placed.site.attrs, placed.site
    w, b = (*_weights(torch, source), None)[:2]
    x, *residual = (t.permute(0, 3, 1, 2) for t in given)
    w = w.contiguous(memory_format=torch.channels_last)
    pads = list(attrs["pads"] or [0] * 4)[:2]
    where = {
        "stride": list(attrs["strides"] or (1, 1)),
        "padding": pads,
        "dilation": list(attrs["dilations"] or (1, 1)),
        "groups": int(attrs["group"]),
    }
    if attrs["activation"] and residual:
        call = partial(torch.cudnn_convolution_add_relu, x, w, residual[0], 1.0, b, **where)
    elif attrs["activation"]:
        call = partial(torch.cudnn_convolution_relu, x, w, b, **where)
    else:
        call = partial(torch.nn.functional.conv2d, x, w, b, **where)
    assert site.outs[0].ndim == 4
    return lambda: call().permute(0, 2, 3, 1)


def convolutions(batch: int = 32) -> list[Row]:
    """ResNet-50's layers against cuDNN, as its plan has them: channels last, with what is fused into them."""
    return [
        row("convolutions", str(layer), partial(alone, layer.placed), partial(_cudnn, layer.placed), times=layer.count)
        for layer in layers_of(batch)
    ]


# ---- what memory bounds

SHAPES = ((65536, 768), (16384, 4096), (2048, 32768))
CHAIN = (16384, 4096)


def _rowwise(kind: str, shape: tuple[int, ...], weights: int, **attributes: Any) -> Made:
    x = {"x": drawn(shape, HALF)}
    w = {f"w{i}": drawn(shape[-1:], HALF) for i in range(weights)}
    return model_of([node(kind, "x", *w, axis=-1, **attributes)], x, w, shape, HALF), x


def _chain(shape: tuple[int, ...]) -> Made:
    x = {name: drawn(shape, HALF) for name in ("x", "r")}
    w = {name: drawn(shape[-1:], HALF) for name in ("scale", "bias")}
    nodes = [
        node("Mul", "x", "scale", output="a"),
        node("Add", "a", "bias", output="b"),
        node("Sigmoid", "b", output="c"),
        node("Mul", "b", "c", output="d"),
        node("Add", "d", "r"),
    ]
    return model_of(nodes, x, w, shape, HALF), x


def _transposed(shape: tuple[int, ...], perm: Sequence[int]) -> Made:
    x = {"x": drawn(shape, HALF)}
    return model_of([node("Transpose", "x", perm=list(perm))], x, {}, [shape[i] for i in perm], HALF), x


def _torch_softmax(torch: Any, source: Source, given: Tensors) -> Callable[[], Any]:
    return partial(torch.softmax, given[0], -1)


def _torch_layer_norm(torch: Any, source: Source, given: Tensors) -> Callable[[], Any]:
    return partial(torch.nn.functional.layer_norm, given[0], given[0].shape[-1:], *_weights(torch, source))


def _torch_rms_norm(torch: Any, source: Source, given: Tensors) -> Callable[[], Any]:
    return partial(torch.nn.functional.rms_norm, given[0], given[0].shape[-1:], *_weights(torch, source), 1e-5)


def _torch_chain(torch: Any, source: Source, given: Tensors) -> Callable[[], Any]:
    scale, bias = _weights(torch, source)

    def chain(x: Any, r: Any) -> Any:
        return torch.nn.functional.silu(x * scale + bias) + r

    return partial(compiled(torch, chain), *given)


def _torch_transpose(perm: Sequence[int], torch: Any, source: Source, given: Tensors) -> Callable[[], Any]:
    x = given[0].permute(*perm)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return partial(out.copy_, x)


TRANSPOSES: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "matrix 8192x8192": ((8192, 8192), (1, 0)),
    "channels last 64x64x112x112": ((64, 64, 112, 112), (0, 2, 3, 1)),
    "channels first 64x112x112x64": ((64, 112, 112, 64), (0, 3, 1, 2)),
    "heads 256x512x16x64": ((256, 512, 16, 64), (0, 2, 1, 3)),
}


def bandwidth() -> list[Row]:
    """Softmax, norms, a chain and transposes, which move more than three times any L2; the chain's peer is compiled."""
    made = []
    for shape in SHAPES:
        name = "x".join(map(str, shape))
        made += [
            row("bandwidth", f"softmax {name}", partial(_rowwise, "Softmax", shape, 0), _torch_softmax),
            row(
                "bandwidth",
                f"layer norm {name}",
                partial(_rowwise, "LayerNormalization", shape, 2, epsilon=1e-5),
                _torch_layer_norm,
            ),
            row(
                "bandwidth",
                f"rms norm {name}",
                partial(_rowwise, "RMSNormalization", shape, 1, epsilon=1e-5),
                _torch_rms_norm,
            ),
        ]
    made.append(row("bandwidth", f"chain {CHAIN[0]}x{CHAIN[1]}", partial(_chain, CHAIN), _torch_chain))
    made += [
        row("bandwidth", f"transpose {name}", partial(_transposed, shape, perm), partial(_torch_transpose, perm))
        for name, (shape, perm) in TRANSPOSES.items()
    ]
    return made
