"""The "triton" kernels of normalisations, of one input and of sums. Declares no operators itself."""

from __future__ import annotations

import numpy as np

from infera_gpu.op import Buffers, Call, Op, Site
from infera_gpu.ops._triton import Kernels, kernels


def _supports_norm(site: Site) -> bool:
    from infera_kernels.triton.norm import supports_norm

    weight, bias = (site.ins[i] if site.has(i) else None for i in (1, 2))
    statistics = all(s.dtype == np.float32 for s in site.outs[1:])
    return statistics and supports_norm(site.spec(0), site.outs[0], weight, bias, axis=site.axis())


def _bind_norm(site: Site, io: Buffers) -> list[Call]:
    from infera_kernels.triton import norm

    x, weight, bias = (*io.ins, None, None)[:3]
    eps, axis = float(site.attrs["epsilon"]), site.axis()
    if site.node.op == "RMSNormalization":
        return norm.rms_norm(x, weight, io.outs[0], io.launcher, eps=eps, axis=axis)
    out, mean, inverse = (*io.outs, None, None)[:3]
    return norm.layer_norm(x, weight, bias, out, io.launcher, eps=eps, axis=axis, mean=mean, inv_std=inverse)


def skip_norm(*, center: bool) -> Kernels:
    """The kernels of normalised sums: input, skip, scale, then the shift if `center`, and a bias added before."""

    def parts(site: Site) -> tuple[int, int | None]:
        """The inputs that are bias and shift."""
        return (4, 3) if center else (3, None)

    def supports(site: Site) -> bool:
        from infera_kernels.triton.elementwise import supports_binary
        from infera_kernels.triton.norm import supports_norm

        x, (bias, shift) = site.spec(0), parts(site)
        terms = [site.spec(1), *([site.spec(bias)] if site.has(bias) else [])]
        beta = site.spec(shift) if shift is not None and site.has(shift) else None
        sums = all(supports_binary("add", x, term, x) for term in terms)
        return sums and not any(site.node.outputs[1:3]) and supports_norm(x, x, site.spec(2), beta)

    def bind(site: Site, io: Buffers) -> list[Call]:
        from infera_kernels.triton import elementwise, norm

        bias, shift = parts(site)
        x, skip, scale, *_ = io.ins
        out, total = io.outs[0], io.outs[3] if len(io.outs) > 3 else io.outs[0]
        calls = list(elementwise.binary("add", x, skip, total, io.launcher))
        if site.has(bias):
            calls += elementwise.binary("add", total, io.ins[bias], total, io.launcher)
        eps = float(site.attrs["epsilon"])
        if not center:
            return calls + norm.rms_norm(total, scale, out, io.launcher, eps=eps)
        beta = io.ins[shift] if shift is not None and site.has(shift) else None
        return calls + norm.layer_norm(total, scale, beta, out, io.launcher, eps=eps)

    return kernels(bind, supports, inplace=(), strided=False)


NORM = kernels(_bind_norm, _supports_norm, inplace=(0,), strided=False)
"""LayerNormalization and RMSNormalization whose scale has the normalised axes' shape."""

OPS: tuple[Op, ...] = ()
