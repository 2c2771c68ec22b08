"""The "triton" kernel of gated products. Declares no operators itself."""

from __future__ import annotations

from infera_gpu.op import Buffers, Call, Op, Site
from infera_gpu.ops._triton import kernels
from infera_gpu.ops._triton_matmul import matrices, right_factor
from infera_gpu.ops._triton_normalized import first, normalizes_first, of_one_row, scratch_first
from infera_gpu.spec import TensorSpec


def _supports(site: Site) -> bool:
    from infera_kernels.triton.gated import supports_gated

    dtypes = site.spec(0).dtype, site.spec(1).dtype, site.outs[0].dtype
    x, gate, out = (TensorSpec(s, d) for s, d in zip(matrices(site), dtypes, strict=True))
    up, activation = TensorSpec(gate.shape, site.spec(2).dtype), site.attrs["activation"] or None
    return supports_gated(x, gate, up, out, activation) and (not site.has(3) or normalizes_first(site, 3))


def _workspace(site: Site) -> int:
    return scratch_first(site, within=of_one_row(site)) if site.has(3) else 0


def _bind(site: Site, io: Buffers) -> list[Call]:
    from infera_kernels.triton.gated import gated
    from infera_kernels.triton.tiles import IEEE, TF32

    left, _, made = matrices(site)
    x, how, calls = first(site, io, 3, within=of_one_row(site)) if site.has(3) else (io.ins[0], {}, [])
    product = gated(
        x.reshape(left),
        right_factor(site, io, 1),
        right_factor(site, io, 2),
        io.outs[0].reshape(made),
        io.launcher,
        activation=site.attrs["activation"] or None,
        precision=TF32 if io.tf32 else IEEE,
        invariant=site.batch_invariant,
        tuned=site.tuned,
        **how,
    )
    return [*calls, *product]


GATED = kernels(_bind, _supports, inplace=(), strided=True, workspace=_workspace)
"""GatedMatMul: one launch, two where several rows are normalised first."""

OPS: tuple[Op, ...] = ()
