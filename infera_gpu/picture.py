"""A plan's memory as a picture: what lies where in the arena, and for how long."""

from __future__ import annotations

from html import escape

from infera_gpu.layout import Space
from infera_gpu.plan import Block, Plan

WIDTH, HEIGHT, MARGIN, TITLE = 1200, 560, 70, 40
NAMED, LETTER = (40, 14), 6.5
"""Width and height of a block from which on it bears its name, and the width of a letter."""
INK, GRID = "#1f2933", "#d5dbe3"
COLOURS = {"input": "#4c8bf5", "output": "#2e9e6b", "scratch": "#b8bec7", "value": "#f2b441"}


def memory_svg(plan: Plan) -> str:
    """An SVG document: steps to the right, bytes upwards, one rectangle a block, named where there is room; hovering
    names all.

    A line marks the lower bound, the most bytes alive at one step. One chart for each memory space with an arena.
    """
    spaces = [s for s, nbytes in plan.arenas.items() if nbytes]
    total = len(spaces) * (HEIGHT + TITLE) + MARGIN
    charts = [_chart(plan, space, TITLE + i * (HEIGHT + TITLE)) for i, space in enumerate(spaces)]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {total}"'
    return (
        f'{head} font-family="sans-serif" font-size="13">'
        f'<rect width="{WIDTH}" height="{total}" fill="white"/>{_legend(total - 24)}{"".join(charts)}</svg>'
    )


def _legend(y: int) -> str:
    parts = []
    for i, (kind, colour) in enumerate(COLOURS.items()):
        x = MARGIN + 130 * i
        parts.append(f'<rect x="{x}" y="{y - 11}" width="14" height="14" fill="{colour}"/>')
        parts.append(f'<text x="{x + 20}" y="{y + 1}" fill="{INK}">{kind}</text>')
    return "".join(parts)


def _ticks(nbytes: int) -> tuple[str, list[float]]:
    """A unit, and round numbers of it from 0 on up to so many bytes: about five."""
    unit, size = ("MiB", 1 << 20) if nbytes >= 1 << 19 else ("KiB", 1 << 10)
    most = nbytes / size
    step = next(n * 10.0**e for e in range(-3, 7) for n in (1, 2, 5) if n * 10.0**e * 5 >= most)
    return unit, [i * step for i in range(int(most / step) + 1)]


def _kind(block: Block, plan: Plan, steps: int) -> str:
    if block.name in plan.inputs or block.name in plan.carried:
        return "input"
    if block.name.startswith("scratch "):
        return "scratch"
    held = {o.offset for o in plan.outputs.values() if not o.constant and o.space == block.space}
    last = block.end > steps
    return "output" if last and any(block.offset <= at < block.offset + block.nbytes for at in held) else "value"


def _chart(plan: Plan, space: Space, top: int) -> str:
    arena, bound, count = plan.arenas[space], plan.lower_bounds[space], len(plan.packed)
    steps = max(count, 1)
    width, height = WIDTH - 2 * MARGIN, HEIGHT - MARGIN
    across, up = width / steps, height / arena
    unit, ticks = _ticks(arena)
    size = (1 << 20) if unit == "MiB" else (1 << 10)

    def y(nbytes: float) -> float:
        return top + height - nbytes * up

    given = ", ".join(f"{name} {o.dtype.name}{list(o.shape)}" for name, o in {**plan.inputs, **plan.carried}.items())
    caption = f"{space} arena for {given or 'no inputs'}: {arena:,} bytes, lower bound {bound:,}, on {plan.device}"
    parts = [f'<text x="{MARGIN}" y="{top - 12}" fill="{INK}" font-size="15">{escape(caption)}</text>']
    for tick in ticks:
        at = y(tick * size)
        parts.append(f'<line x1="{MARGIN}" x2="{MARGIN + width}" y1="{at:.1f}" y2="{at:.1f}" stroke="{GRID}"/>')
        parts.append(f'<text x="{MARGIN - 6}" y="{at + 4:.1f}" text-anchor="end" fill="{INK}">{tick:g}</text>')
    parts.append(f'<text x="{MARGIN - 6}" y="{top - 12}" text-anchor="end" fill="{INK}">{unit}</text>')
    for b in plan.blocks:
        if b.space != space:
            continue
        begin, end = min(b.begin, steps), min(b.end, steps)
        title = escape(f"{b.name}: {b.nbytes:,} bytes at {b.offset:,}, steps {b.begin} to {b.end - 1}")
        x, wide, high = MARGIN + begin * across, max((end - begin) * across, 0.8), max(b.nbytes * up, 0.8)
        parts.append(
            f'<rect x="{x:.2f}" y="{y(b.offset + b.nbytes):.2f}" width="{wide:.2f}" height="{high:.2f}" '
            f'fill="{COLOURS[_kind(b, plan, count)]}" stroke="white" stroke-width="0.5"><title>{title}</title></rect>'
        )
        if wide >= NAMED[0] and high >= NAMED[1]:
            fits = int(wide / LETTER)
            name = b.name if len(b.name) <= fits else f"{b.name[: fits - 1]}…"
            parts.append(
                f'<text x="{x + wide / 2:.1f}" y="{y(b.offset + b.nbytes / 2) + 4:.1f}" text-anchor="middle" '
                f'fill="{INK}" font-size="11" pointer-events="none">{escape(name)}</text>'
            )
    at = y(bound)
    parts.append(
        f'<line x1="{MARGIN}" x2="{MARGIN + width}" y1="{at:.1f}" y2="{at:.1f}" stroke="{INK}" stroke-dasharray="5 4"/>'
    )
    parts += [
        f'<text x="{MARGIN + i * across:.1f}" y="{top + height + 18}" fill="{INK}" text-anchor="middle">{i}</text>'
        for i in range(0, steps + 1, max(1, steps // 10))
    ]
    parts.append(f'<text x="{MARGIN + width}" y="{top + height + 34}" fill="{INK}" text-anchor="end">step</text>')
    return "".join(parts)
