"""`infera ops`: the operators that are declared, and how each device runs them."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Annotated

import typer

from infera_gpu.cli.console import table
from infera_gpu.op import Op


def _way(op: Op, kind: str, plain: str) -> str:
    """How the device that prefers this kind of kernel runs the operator."""
    return "host" if op.host else "view" if op.view else "kernel" if kind in op.kernels else plain


WAYS = ("kernel", "view", "plain", "CuPy", "NumPy", "host")
"""How operators run, the fastest first; what they mean is written in PAGE."""

COLUMNS = ("domain", "operator", "from opset", "CPU", "CUDA")


def support(ops: Iterable[Op]) -> list[tuple[str, ...]]:
    """One row under COLUMNS for each operator, its versions together; what differs between versions is listed.

    "kernel" is one that allocates nothing (CPU) or a Triton kernel (CUDA), for the types and shapes that it supports;
    "plain" and "CuPy" are the operator's own function on NumPy and on CuPy; "NumPy" is a step on the host, with copies;
    "host" runs there between two plans.
    """
    versions: dict[tuple[str, str], list[Op]] = {}
    for op in ops:
        versions.setdefault((op.domain, op.name), []).append(op)

    def joined(values: Iterable[str]) -> str:
        return ", ".join(dict.fromkeys(values))

    return [
        (
            domain or "ai.onnx",
            name,
            ", ".join(str(op.since) for op in found),
            joined(_way(op, "cpu", "plain") for op in found),
            joined(_way(op, "triton", "CuPy" if op.portable else "NumPy") for op in found),
        )
        for (domain, name), found in sorted(versions.items())
    ]


def markdown(rows: Iterable[tuple[str, ...]]) -> str:
    """The rows as a Markdown table."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


class Which(StrEnum):
    """The devices to tell of; their columns have the same names in capitals."""

    cpu = "cpu"
    cuda = "cuda"


def by_way(rows: Iterable[tuple[str, ...]], device: Which) -> dict[str, list[tuple[str, ...]]]:
    """The rows by how the newest version of an operator runs on a device."""
    column = COLUMNS.index(device.value.upper())
    found: dict[str, list[tuple[str, ...]]] = {}
    for row in rows:
        found.setdefault(row[column].split(", ")[-1], []).append(row[:3])
    return {way: found[way] for way in WAYS if way in found}


def command(
    device: Annotated[Which | None, typer.Option(help="Only this device, sorted by how operators run there.")] = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print docs/operators.md.")] = False,
) -> None:
    """Show the operators that are declared, from which opset on, and how each device runs them."""
    from infera_gpu.ops import registry

    rows = support(registry())
    if as_markdown:
        print(PAGE + markdown(rows), end="")
    elif device is None:
        table(COLUMNS, rows)
    else:
        found = by_way(rows, device)
        title = ", ".join(f"{len(operators)} {way}" for way, operators in found.items())
        shown = [(*row, way) for way, operators in found.items() for row in operators]
        table((*COLUMNS[:3], device.value.upper()), shown, title=f"{len(rows)} operators: {title}")
    if not as_markdown:
        print(DECIDING)


DECIDING = (
    "Types and shapes decide whether a kernel is used: `infera inspect MODEL` shows it step by step, as on a GPU with "
    "`--device recording`."
)
"""Under the tables."""

PAGE = """# Operators

Made by `infera ops --markdown > docs/operators.md`; a test compares. A version answers from its opset until the next.

- **kernel**: on the CPU one that allocates nothing, on CUDA a Triton kernel; for the types and shapes that it supports.
  Where it does not, the operator runs as below.
- **view**: a window into its input; no step and no memory.
- **plain**: the operator's own function on NumPy. **CuPy**: the same function on the GPU. **NumPy**: on the host, with
  the copies as steps of the plan.
- **host**: between two plans, on values that no arena holds: sequences, maps, strings, the turns of a loop. What a loop
  repeats is planned like everything else.
- `If` needs no row: it is replaced by the branch that is taken.

"""
