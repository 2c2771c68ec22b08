"""Charts as SVG, from numbers: bars beside each other, and points under a roofline."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#7f7f7f")
_STYLE = (
    "text{font:12px sans-serif;fill:#333}.title{font-weight:bold;font-size:14px}.end{text-anchor:end}"
    ".mid{text-anchor:middle}.grid{stroke:#e5e5e5}.axis{stroke:#999}.roof{stroke:#333;stroke-width:1.5;fill:none}"
    ".one{stroke:#333;stroke-dasharray:4 3}"
)


def _document(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
    background = '<rect width="100%" height="100%" fill="#fff"/>'
    shown = f'<text x="12" y="22" class="title">{escape(title)}</text>'
    return "\n".join([head, f"<style>{_STYLE}</style>", background, shown, *parts, "</svg>\n"])


def _legend(names: Sequence[str], x: float, y: float) -> list[str]:
    """Squares in the colours of the series, with their names."""
    parts = []
    for name, colour in zip(names, COLOURS, strict=False):
        parts.append(f'<rect x="{x:.0f}" y="{y - 9:.0f}" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{x + 15:.0f}" y="{y:.0f}">{escape(name)}</text>')
        x += 28 + 6.6 * len(name)
    return parts


def bars(title: str, rows: Mapping[str, Mapping[str, float]], *, unit: str, one: bool = False) -> str:
    """Horizontal bars from zero: row -> series -> value. `one` marks where the value is 1."""
    names = list(dict.fromkeys(name for values in rows.values() for name in values))
    left, wide, thick, above = 190, 520, 9, 62
    top = max(value for values in rows.values() for value in values.values())
    step = _round_step(top / 6)
    parts = _legend(names, left, 44)
    y = float(above)
    body = []
    for label, values in rows.items():
        middle = y + thick * len(names) / 2 + 4
        body.append(f'<text x="{left - 8}" y="{middle:.1f}" class="end">{escape(label)}</text>')
        for name, value in values.items():
            at = y + thick * names.index(name)
            length = wide * value / top
            body.append(
                f'<rect x="{left}" y="{at:.1f}" width="{length:.1f}" height="{thick - 1}" '
                f'fill="{COLOURS[names.index(name)]}"/>'
            )
        y += thick * len(names) + 8
    for i in range(int(top / step) + 1):
        x = left + wide * i * step / top
        parts.append(f'<path d="M{x:.1f},{above - 6}V{y:.1f}" class="grid"/>')
        parts.append(f'<text x="{x:.1f}" y="{y + 16:.1f}" class="mid">{i * step:g}</text>')
    parts += body
    if one:
        parts.append(f'<path d="M{left + wide / top:.1f},{above - 6}V{y:.1f}" class="one"/>')
    parts.append(f'<text x="{left + wide / 2:.0f}" y="{y + 36:.0f}" class="mid">{escape(unit)}</text>')
    return _document(left + wide + 40, round(y) + 48, title, parts)


def _round_step(least: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * k for k in (1, 2, 5, 10) if power * k >= least * 0.999)


@dataclass(frozen=True)
class Point:
    """A row under a roofline: operations a byte, operations a second."""

    series: str
    intensity: float
    rate: float


def roofline(title: str, points: Sequence[Point], roofs: Mapping[str, float], bytes_per_s: float) -> str:
    """Points on logarithmic axes, under the line of memory and a roof for each arithmetic, in operations a second."""
    left, above, wide, high = 80, 66, 620, 380
    xs = [p.intensity for p in points] + [peak / bytes_per_s for peak in roofs.values()]
    ys = [p.rate for p in points] + list(roofs.values())
    x0, x1 = math.floor(math.log10(min(xs))), math.ceil(math.log10(max(xs)))
    y0, y1 = math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys)))

    def x(value: float) -> float:
        return left + wide * (math.log10(value) - x0) / (x1 - x0)

    def y(value: float) -> float:
        return above + high * (1 - (math.log10(value) - y0) / (y1 - y0))

    names = list(dict.fromkeys(p.series for p in points))
    parts = _legend(names, left, 44)
    for power in range(x0, x1 + 1):
        at = x(10.0**power)
        parts.append(f'<path d="M{at:.1f},{above}V{above + high}" class="grid"/>')
        parts.append(f'<text x="{at:.1f}" y="{above + high + 18}" class="mid">{10.0**power:g}</text>')
    for power in range(y0, y1 + 1):
        at = y(10.0**power)
        parts.append(f'<path d="M{left},{at:.1f}H{left + wide}" class="grid"/>')
        parts.append(f'<text x="{left - 8}" y="{at + 4:.1f}" class="end">{10.0 ** (power - 12):g}</text>')
    peak = max(roofs.values())
    begin, end = max(10.0**x0, 10.0**y0 / bytes_per_s), peak / bytes_per_s
    line = f"M{x(begin):.1f},{y(begin * bytes_per_s):.1f}L{x(end):.1f},{y(peak):.1f}"
    parts.append(f'<path d="{line}" class="roof"/>')
    for name, value in roofs.items():
        parts.append(f'<path d="M{x(value / bytes_per_s):.1f},{y(value):.1f}H{left + wide}" class="roof"/>')
        parts.append(f'<text x="{left + wide - 4}" y="{y(value) - 5:.1f}" class="end">{escape(name)}</text>')
    parts += [
        f'<circle cx="{x(p.intensity):.1f}" cy="{y(p.rate):.1f}" r="4" fill="{COLOURS[names.index(p.series)]}" '
        'fill-opacity="0.65"/>'
        for p in points
    ]
    parts.append(f'<text x="{left + wide / 2:.0f}" y="{above + high + 38}" class="mid">operations a byte</text>')
    parts.append(f'<text x="12" y="{above - 18}">TFLOP/s</text>')
    return _document(left + wide + 30, above + high + 52, title, parts)
