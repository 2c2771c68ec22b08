"""The "jit" kernel of LSTM, GRU and RNN: see `_jit`. Declares no operators itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from infera_gpu.op import Buffers, Call, Site
from infera_gpu.ops._families import split_of
from infera_gpu.ops._jit import PRODUCT_NS
from infera_kernels.calls import Pack, one_after_the_other
from infera_kernels.cpu.parts import worth


def bind(
    site: Site, io: Buffers, directions: Sequence[dict[str, Any]], weights: tuple[int, int, int], rows: int
) -> list[Call]:
    """An LSTM, GRU or RNN whose `weights`, the inputs W, R and B, are constant; `directions` are what `direction` of
    `infera_kernels.jit.recurrent` takes besides, `rows` the steps times the sequences."""
    from infera_kernels.jit.recurrent import KINDS, direction

    name = f"{site.node.op}_LINEAR" if site.attrs.get("linear_before_reset", 0) else site.node.op
    w, r, b = weights

    def pack(i: int, d: int) -> Pack:
        return lambda tag, build: io.pack(i, f"{tag} of {d}", lambda value: build(value[d]))

    made = [
        direction(
            KINDS.index(name),
            weight=pack(w, d),
            recurrent=pack(r, d),
            bias=pack(b, d) if site.has(b) else None,
            **given,
        )
        for d, given in enumerate(directions)
    ]
    work = PRODUCT_NS * rows * (site.spec(w).size + site.spec(r).size)
    together = worth(work, split_of(io)).threads >= len(made)
    return io.parallel(made) if together else one_after_the_other(made)
