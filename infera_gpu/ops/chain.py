"""Elementwise: a chain of elementwise operators in one node, as its attribute spells them out.

The expression is a list of steps, `Operator[:attribute=number,...] argument...`, separated by "; ". An argument is
input i, `x<i>`, or the result of step i, `t<i>`; the last step is the output: "Mul x0 x1; LeakyRelu:alpha=0.1 t0".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from types import MappingProxyType
from typing import Any

import numpy as np

from infera_gpu.graph import HostArray, Node, made_name
from infera_gpu.op import REQUIRED, Buffers, Call, Case, Expansion, Kernel, Op, Site, f32
from infera_gpu.ops import activation, cast, compare, elementwise
from infera_gpu.ops._families import CHAIN_NS, PASS_NS, plain, split_of
from infera_gpu.ops._triton_elementwise import Terms, formula, formula_of
from infera_gpu.spec import Array, TensorSpec
from infera_kernels.cpu.chain import LARGE, Emit, Step, chain
from infera_kernels.cpu.elementwise import BLOCK
from infera_kernels.cpu.parts import worth
from infera_kernels.triton.terms import joined

BLOCKWISE = frozenset(
    (
        *("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Sum", "Where", "Neg", "Abs", "Sqrt", "Reciprocal"),
        *("Exp", "Log", "Floor", "Ceil", "Round", "Sign", "Sin", "Cos", "Erf", "Relu", "LeakyRelu", "Elu", "Selu"),
        *("Celu", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Softplus", "Softsign", "Mish", "Swish", "Clip"),
        "Gelu",
    )
)
"""What has the element type of its last input, and a CPU kernel that works on blocks."""


def _steps() -> Mapping[str, Op]:
    """The newest version of each; Clip's first, whose bounds are attributes, and Gelu of any opset."""
    declared = (*elementwise.OPS, *activation.OPS, *compare.OPS, *cast.OPS)
    found = {op.name: op for op in declared if op.name in BLOCKWISE or formula_of(op)}
    bounded = min((op for op in activation.OPS if op.name == "Clip"), key=lambda op: op.since)
    return MappingProxyType({**found, "Clip": bounded})


_SLOW = frozenset(op.name for op in activation.OPS) - {"Relu", "LeakyRelu", "Clip"} | {"Erf", "Exp", "Log", "Pow"}
"""Steps that are chains of ufuncs themselves, or as slow."""

STEPS = _steps()
"""What a step may be: operators of one output."""


@dataclass(frozen=True, slots=True)
class Term:
    """A step of an expression. `args` count the inputs, and after them the steps."""

    op: str
    attrs: tuple[tuple[str, int | float | str], ...]
    args: tuple[int, ...]


@lru_cache(1024)
def parsed(expression: str, inputs: int) -> tuple[Term, ...]:
    """The steps of an expression. Raises ValueError where it is none over so many inputs."""
    terms: list[Term] = []
    for text in expression.split(";"):
        head, *names = text.split()
        op, _, given = head.partition(":")
        if op not in STEPS:
            raise ValueError(f"'{op}' is no step of an expression")
        attrs = tuple((k, _value(v)) for k, _, v in (pair.partition("=") for pair in given.split(",") if pair))
        args = tuple(int(n[1:]) + (inputs if n[0] == "t" else 0) for n in names)
        if any(
            n[0] not in "xt" or a >= inputs + (len(terms) if n[0] == "t" else 0)
            for n, a in zip(names, args, strict=True)
        ):
            raise ValueError(f"step '{text.strip()}' takes what is not there")
        terms.append(Term(op, attrs, args))
    return tuple(terms)


def _value(text: str) -> int | float | str:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def spelled(terms: Sequence[Term], inputs: int) -> str:
    """The expression of steps; `parsed` is its inverse."""

    def head(term: Term) -> str:
        given = ",".join(f"{k}={v!r}" if isinstance(v, float) else f"{k}={v}" for k, v in term.attrs)
        return f"{term.op}:{given}" if given else term.op

    def name(arg: int) -> str:
        return f"x{arg}" if arg < inputs else f"t{arg - inputs}"

    return "; ".join(" ".join((head(t), *map(name, t.args))) for t in terms)


def _terms(site: Site) -> tuple[Term, ...]:
    return site.once("terms", lambda: _parsed(site))


def _parsed(site: Site) -> tuple[Term, ...]:
    try:
        return parsed(str(site.attrs["expression"]), len(site.ins))
    except (ValueError, IndexError) as error:
        raise site.fail(f"expression '{site.attrs['expression']}': {error}") from None


def _sites(site: Site) -> list[Site]:
    """Each step as a node at concrete shapes."""
    return site.once("steps", lambda: _made_sites(site))


def _made_sites(site: Site) -> list[Site]:
    specs, values = list(site.ins), list(site.values)
    made: list[Site] = []
    for i, term in enumerate(_terms(site)):
        op = STEPS[term.op]
        node = Node(
            term.op, tuple(f"{a}" for a in term.args), (f"{len(site.ins) + i}",), dict(term.attrs), name=site.node.name
        )
        step = Site(
            node,
            op.fill(node),
            tuple(specs[a] for a in term.args),
            tuple(values[a] for a in term.args),
            opset=op.since,
        )
        (out,) = op.infer(step)
        assert out is not None
        made.append(step.giving((out,)))
        specs.append(out)
        values.append(None)
    return made


def _infer(site: Site) -> tuple[TensorSpec]:
    return (_sites(site)[-1].outs[0],)


def _compute(xp: Any, site: Site, *ins: Array) -> Array:
    values = list(ins)
    for term, step in zip(_terms(site), _sites(site), strict=True):
        values.append(STEPS[term.op].outputs(xp, step, [values[a] for a in term.args])[0])
    return values[-1]


# ---- on the CPU


@dataclass(frozen=True, slots=True)
class _Block:
    """What a step's kernel is bound to: views of one block."""

    io: Buffers
    ins: tuple[Array, ...]
    outs: tuple[Array, ...]
    scratch: Any
    threads: int = 1

    def __getattr__(self, name: str) -> Any:
        return getattr(self.io, name)


def _emitter(step: Site, io: Buffers) -> Emit:
    kernel = STEPS[step.node.op].kernels["cpu"]

    def emit(ins: Sequence[Array], out: Array, scratch: Any) -> Sequence[Call]:
        return kernel.bind(step, _Block(io, tuple(ins), (out,), scratch))  # type: ignore[arg-type]

    return emit


def _inplace(step: Site) -> tuple[int, ...]:
    """Of two inputs combined by one ufunc either may be overwritten; of more, some are read later."""
    pair = step.node.op in ("Max", "Min", "Sum") and len(step.ins) == 2
    return (0, 1) if pair else STEPS[step.node.op].kernels["cpu"].inplace


def _is_of_part(part: int, parts: int, block: int, blocks: int) -> bool:
    return block * parts // blocks == part


def _bind(site: Site, io: Buffers) -> Sequence[Call]:
    steps = [
        Step(_emitter(step, io), term.args, _inplace(step))
        for step, term in zip(_sites(site), _terms(site), strict=True)
    ]
    ns = sum(CHAIN_NS if term.op in _SLOW else PASS_NS for term in _terms(site))
    threads = worth(ns * site.outs[0].size, split_of(io)).threads
    size = min(LARGE, max(BLOCK, -(-site.outs[0].size // threads)))
    parts = [
        chain(steps, io.ins, io.outs[0], io.scratch, size=size, within=partial(_is_of_part, part, threads))
        for part in range(threads)
    ]
    return io.parallel([part for part in parts if part])


def _supports(site: Site) -> bool:
    return site.outs[0].size > 0 and all(
        s.node.op in BLOCKWISE and STEPS[s.node.op].kernels["cpu"].supports(s) for s in _sites(site)
    )


# ---- on the GPU


def _composed(site: Site) -> Terms | None:
    """The steps' own expressions as one."""
    parts = []
    for term, step in zip(_terms(site), _sites(site), strict=True):
        own = formula_of(STEPS[term.op])
        terms = None if own is None else own.terms(step)
        if terms is None:
            return None
        parts.append((terms, term.args))
    return joined(parts, len(site.ins))


_GPU = formula(_composed)


# ---- apart


def _expand(site: Site) -> Expansion | None:
    """Chains of steps of one shape each: what is computed once for a row, or ahead of all runs, is not done again.

    A step goes with those that read it where all of them are in one chain, and it has their shape, which does not
    matter where launching it costs more than computing it again for every element (`recompute`); what is known while
    planning stays apart from what is not. What no kernel takes as one comes apart altogether.
    """
    terms, sites, inputs = _terms(site), _sites(site), len(site.ins)
    recompute = bool(site.attrs["recompute"])
    whole = not recompute or _GPU["triton"].supports(site.giving(sites[-1].outs))
    known = [v is not None for v in site.values]
    for term in terms:
        known.append(all(known[a] for a in term.args))
    readers: dict[int, list[int]] = {}
    for i, term in enumerate(terms):
        for a in term.args:
            readers.setdefault(a, []).append(i)
    chains = list(range(len(terms)))
    for i in reversed(range(len(terms) - 1)):
        into = {chains[r] for r in readers.get(inputs + i, ())}
        if len(into) == 1:
            (last,) = into
            alike = recompute or sites[i].outs == sites[last].outs
            if whole and alike and known[inputs + i] == known[inputs + last]:
                chains[i] = last
    lasts = sorted(set(chains))
    if len(lasts) == 1 and len(terms) > 1:
        return None
    return Expansion(tuple(_apart(site, terms, [i for i, c in enumerate(chains) if c == last]) for last in lasts))


def _apart(site: Site, terms: Sequence[Term], chosen: Sequence[int]) -> Node:
    """One chain of an expression: its own operator where it is one step."""
    inputs, node = len(site.ins), site.node

    def value(arg: int) -> str:
        if arg < inputs:
            return node.inputs[arg]
        return node.outputs[0] if arg == inputs + len(terms) - 1 else made_name(node.outputs[0], "step", arg - inputs)

    inner = {inputs + i for i in chosen}
    outer = list(dict.fromkeys(a for i in chosen for a in terms[i].args if a not in inner))
    place = {a: k for k, a in enumerate(outer)} | {inputs + i: len(outer) + k for k, i in enumerate(chosen)}
    outputs = (value(inputs + chosen[-1]),)
    if len(chosen) == 1:
        term = terms[chosen[0]]
        op = STEPS[term.op]
        opset = op.since if not op.domain else 0
        return Node(term.op, tuple(map(value, term.args)), outputs, dict(term.attrs), op.domain, node.name, opset=opset)
    own = [replace(terms[i], args=tuple(place[a] for a in terms[i].args)) for i in chosen]
    attrs = {**node.attrs, "expression": spelled(own, len(outer))}
    return Node("Elementwise", tuple(map(value, outer)), outputs, attrs, "infera", node.name)


def _e(expression: str) -> dict[str, Any]:
    return {"expression": expression}


_MASK = np.array([[True, False, True], [False, False, True]])
_KNOWN: HostArray = np.array([0.5, -1.5, 2], np.float32)

OPS: tuple[Op, ...] = (
    Op(
        "Elementwise",
        1,
        domain="infera",
        infer=_infer,
        compute=plain(_compute),
        attrs={"expression": REQUIRED, "recompute": 0},
        expand=_expand,
        kernels={"cpu": Kernel(_bind, _supports, inplace=(0,), strided=True)} | _GPU,
        cases=(
            Case(
                "gates",
                (f32(3, 5), f32(3, 5), f32(3, 5), f32(3, 5)),
                _e("Sigmoid x0; Mul t0 x1; Tanh x2; Sigmoid x3; Mul t3 t2; Add t1 t4"),
            ),
            Case("past_block", (f32(3, 6001), f32(6001), f32()), _e("Mul x0 x1; Add t0 x2; Tanh t1; Mul t2 x0")),
            Case(
                "attributes_past_block",
                (f32(4, 9001), f32(4, 1)),
                _e("LeakyRelu:alpha=0.3 x0; Add t0 x1; Clip:min=-0.5,max=1.25 t1"),
            ),
            Case("choice", (_MASK, f32(2, 3), f32(2, 3)), _e("Exp x1; Neg x2; Where x0 t0 t1")),
            Case("squares", (f32(2, 3), f32(2, 3)), _e("Sub x0 x1; Mul t0 t0; Neg t1")),
            Case("subtracted_from", (f32(2, 3), f32(2, 3)), _e("Exp x0; Max t0 x1; Sub x1 t1")),
            Case("three", (f32(2, 3), f32(2, 3), f32(2, 3)), _e("Neg x2; Sum x0 x1 t0")),
            Case("gelu_past_block", (f32(2, 9001), f32(2, 9001)), _e("Gelu:approximate=tanh x0; Mul t0 x1")),
            Case("row_apart", (f32(4, 3), f32(3)), _e("Exp x1; Mul x0 t0; Neg t1")),
            Case("known", (f32(4, 3), _KNOWN), _e("Exp x1; Neg t0; Mul x0 t1; Abs t2")),
            Case("one", (f32(4, 3),), _e("Swish:alpha=1.7 x0")),
            Case("double", (TensorSpec((3, 5), np.dtype(np.float64)),), _e("Exp x0; Sqrt t0")),
            Case("half", (TensorSpec((3, 5), np.dtype(np.float16)),), _e("Sigmoid x0; Mul t0 x0"), tol=2e-3),
            Case("empty", (f32(0, 3), f32(3)), _e("Add x0 x1; Exp t0")),
            Case(
                "types",
                (f32(3, 5), TensorSpec((5,), np.dtype(np.int64)), TensorSpec((3, 1), np.dtype(np.bool_))),
                _e("Cast:to=1 x1; Less t0 x0; Or t1 x2; Cast:to=1 t2; Sub x0 t3; IsNaN t4; Where t5 t0 t4")
                | {"recompute": 1},
            ),
            Case(
                "recomputed",
                (f32(4, 3), f32(3), f32(4, 1)),
                _e("Exp x1; Mul x0 t0; Tanh x2; Add t1 t2") | {"recompute": 1},
            ),
        ),
    ),
)
