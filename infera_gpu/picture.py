"""A plan's memory as a picture: what lies where in the arena, and for how long."""

from __future__ import annotations

from html import escape

from infera_gpu.layout import Space
from infera_gpu.plan import Block, Plan

WIDTH, HEIGHT, MARGIN, TITLE = 1200, 560, 70, 40
INK, GRID = "#1f2933", "#d5dbe3"
COLOURS = {"input": "#4c8bf5", "output": "#2e9e6b", "scratch": "#b8bec7", "value": "#f2b441"}


def memory_svg(plan: Plan) -> str:
    """An SVG document: steps to the right, bytes upwards, one rectangle a block; hovering names it.

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


def _kind(block: Block, plan: Plan) -> str:
    if block.name in plan.inputs or block.name in plan.carried:
        return "input"
    if block.name.startswith("scratch "):
        return "scratch"
    held = {o.offset for o in plan.outputs.values() if not o.constant and o.space == block.space}
    last = block.end > len(plan.steps)
    return "output" if last and any(block.offset <= at < block.offset + block.nbytes for at in held) else "value"


def _chart(plan: Plan, space: Space, top: int) -> str:
    arena, bound = plan.arenas[space], plan.lower_bounds[space]
    steps = max(len(plan.steps), 1)
    width, height = WIDTH - 2 * MARGIN, HEIGHT - MARGIN
    across, up = width / steps, height / arena

    def y(nbytes: float) -> float:
        return top + height - nbytes * up

    caption = f"{space} arena: {arena:,} bytes, lower bound {bound:,}, {len(plan.steps)} steps on {escape(plan.device)}"
    parts = [f'<text x="{MARGIN}" y="{top - 12}" fill="{INK}" font-size="15">{caption}</text>']
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        at = y(share * arena)
        parts.append(f'<line x1="{MARGIN}" x2="{MARGIN + width}" y1="{at:.1f}" y2="{at:.1f}" stroke="{GRID}"/>')
        label = f"{share * arena / 2**20:.2f}"
        parts.append(f'<text x="{MARGIN - 6}" y="{at + 4:.1f}" text-anchor="end" fill="{INK}">{label}</text>')
    parts.append(f'<text x="{MARGIN - 6}" y="{top - 12}" text-anchor="end" fill="{INK}">MiB</text>')
    for b in plan.blocks:
        if b.space != space:
            continue
        begin, end = min(b.begin, steps), min(b.end, steps)
        title = escape(f"{b.name}: {b.nbytes:,} bytes at {b.offset:,}, steps {b.begin} to {b.end - 1}")
        parts.append(
            f'<rect x="{MARGIN + begin * across:.2f}" y="{y(b.offset + b.nbytes):.2f}" '
            f'width="{max((end - begin) * across, 0.8):.2f}" height="{max(b.nbytes * up, 0.8):.2f}" '
            f'fill="{COLOURS[_kind(b, plan)]}" stroke="white" stroke-width="0.5"><title>{title}</title></rect>'
        )
    at = y(bound)
    parts.append(
        f'<line x1="{MARGIN}" x2="{MARGIN + width}" y1="{at:.1f}" y2="{at:.1f}" stroke="{INK}" stroke-dasharray="5 4"/>'
    )
    parts += [
        f'<text x="{MARGIN + i * across:.1f}" y="{top + height + 18}" fill="{INK}" text-anchor="middle">{i}</text>'
        for i in range(0, steps + 1, max(1, steps // 10))
    ]
    return "".join(parts)
