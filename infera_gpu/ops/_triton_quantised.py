"""The "triton" kernels of quantised forms of plain operators. Declares no operators itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from infera_gpu.op import Buffers, Call, Op, Site
from infera_gpu.ops._triton import Kernels, kernels
from infera_gpu.ops._triton_quant_matmul import Get, array_getter, spec_getter

if TYPE_CHECKING:
    from infera_kernels.triton.quantised import Quantised


def _tensors(site: Site, get: Get, operands: int, out: object, xs: tuple[object, ...]) -> list[Quantised]:
    """The operands, three inputs each, and the output, whose scale and zero point are the last two."""
    from infera_kernels.triton.quantised import Quantised

    last = 3 * operands
    made = [Quantised(xs[i], get(3 * i + 1), get(3 * i + 2)) for i in range(operands)]
    return [*made, Quantised(out, get(last), get(last + 1))]


def _specs(site: Site, operands: int) -> list[Quantised]:
    return _tensors(site, spec_getter(site), operands, site.outs[0], tuple(site.spec(3 * i) for i in range(operands)))


def _arrays(site: Site, io: Buffers, operands: int) -> list[Quantised]:
    return _tensors(site, array_getter(site, io), operands, io.outs[0], tuple(io.ins[3 * i] for i in range(operands)))


def elementwise(function: str, operands: int) -> Kernels:
    """The kernels of a function of the quantised operands alone."""

    def supports(site: Site) -> bool:
        from infera_kernels.triton.quantised import supports_quantised

        *given, out = _specs(site, operands)
        return supports_quantised(out, *given)

    def bind(site: Site, io: Buffers) -> list[Call]:
        from infera_kernels.triton.quantised import quantised

        *given, out = _arrays(site, io, operands)
        return quantised(function, tuple(given), out, io.launcher, alpha=float(site.attrs.get("alpha", 0.0)))

    return kernels(bind, supports, inplace=(), strided=True)


def _supports_mean(site: Site) -> bool:
    from infera_kernels.triton.quantised import supports_quantised_mean

    x, out = _specs(site, 1)
    return supports_quantised_mean(out, x)


def _bind_mean(site: Site, io: Buffers) -> list[Call]:
    from infera_kernels.triton.quantised import quantised_mean

    x, out = _arrays(site, io, 1)
    return quantised_mean(x, out, io.launcher, last=bool(site.attrs["channels_last"]))


MEAN = kernels(_bind_mean, _supports_mean, inplace=(), strided=False)
"""QLinearGlobalAveragePool."""

OPS: tuple[Op, ...] = ()
