"""The "triton" kernel of gated products. Declares no operators itself."""

from __future__ import annotations

from infera_gpu.op import Buffers, Call, Op, Site
from infera_gpu.ops._triton import kernels
from infera_gpu.ops._triton_matmul import matrices, right_factor
from infera_gpu.spec import TensorSpec


def _supports(site: Site) -> bool:
    from infera_kernels.triton.gated import supports_gated

    dtypes = site.spec(0).dtype, site.spec(1).dtype, site.outs[0].dtype
    x, gate, out = (TensorSpec(s, d) for s, d in zip(matrices(site), dtypes, strict=True))
    return supports_gated(x, gate, TensorSpec(gate.shape, site.spec(2).dtype), out, site.attrs["activation"] or None)


def _bind(site: Site, io: Buffers) -> list[Call]:
    from infera_kernels.triton.gated import gated
    from infera_kernels.triton.tiles import IEEE, TF32

    left, _, made = matrices(site)
    return gated(
        io.ins[0].reshape(left),
        right_factor(site, io, 1),
        right_factor(site, io, 2),
        io.outs[0].reshape(made),
        io.launcher,
        activation=site.attrs["activation"] or None,
        precision=TF32 if io.tf32 else IEEE,
        invariant=site.batch_invariant,
        tuned=site.tuned,
    )


GATED = kernels(_bind, _supports, inplace=(), strided=True)
"""GatedMatMul, in one launch."""

OPS: tuple[Op, ...] = ()
