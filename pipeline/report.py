"""Parts of a report: one HTML file that needs no other, the same bytes for the same input."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

WIDTH = 440  # of a chart, in its own units
LINES = 4  # styles of lines in STYLE
MARKED = 30  # longest series with a mark at every point
STYLE = """
:root{color-scheme:light dark;--ink:#1c1e21;--soft:#5b6168;--rule:#d5d8dc;--paper:#fff;
--s0:#0067a5;--s1:#c44e00;--s2:#00805c;--s3:#a0458a}
@media screen and (prefers-color-scheme:dark){:root{--ink:#e6e8ea;--soft:#a2a9b0;--rule:#3b4046;
--paper:#16181b;--s0:#5cb3f0;--s1:#f0a04b;--s2:#3cc79a;--s3:#e296cf}}
body{margin:0 auto;padding:1rem;max-width:66rem;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{line-height:1.2}h2{margin-top:2.5rem;border-bottom:1px solid var(--rule)}
h3{margin:1.5rem 0 .3rem}h2,h3{break-after:avoid}p{max-width:44rem}
.wide,figure{overflow-x:auto}figure{margin:.6rem 0 1.2rem;break-inside:avoid}
figcaption{color:var(--soft);font-size:.875rem;max-width:44rem}
table{border-collapse:collapse;margin:.6rem 0;overflow-wrap:break-word;font-size:.9375rem}
th,td{text-align:left;vertical-align:top;padding:.25rem 1.2rem .25rem 0;
border-bottom:1px solid var(--rule)}
td:not(.n){min-width:6rem}tr{break-inside:avoid}
.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
img{max-width:100%;height:auto;display:block}
pre{white-space:pre-wrap;font-size:.875rem}
.pair{break-inside:avoid}.pair figure{margin:.3rem 0}
svg{display:block;width:100%;min-width:20rem;max-width:36rem;height:auto}
svg text{fill:var(--ink);font:13px system-ui,sans-serif}.c{text-anchor:middle}.e{text-anchor:end}
.rule{stroke:var(--rule)}.axis{stroke:var(--soft)}.bar{fill:var(--s0)}
.error{stroke:var(--ink);stroke-width:1.5}.line{fill:none;stroke-width:2;stroke-linejoin:round}
.l0{stroke:var(--s0)}.l1{stroke:var(--s1);stroke-dasharray:7 3}
.l2{stroke:var(--s2);stroke-dasharray:2 3}.l3{stroke:var(--s3);stroke-dasharray:8 3 2 3}
.m0{fill:var(--s0)}.m1{fill:var(--s1)}.m2{fill:var(--s2)}.m3{fill:var(--s3)}
@media(max-width:30rem){table{font-size:.8125rem}th,td{padding-right:.6rem}}
@media print{body{max-width:none;font-size:11pt}td{overflow-wrap:anywhere}
details::details-content{content-visibility:visible;block-size:auto}}
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(title: str, lead: str, sections: Sequence[tuple[str, str]]) -> bytes:
    """A whole page.

    Args:
        title: plain text.
        lead: HTML below the title.
        sections: heading (plain text) and body (HTML) of each.
    """
    body = "\n".join(f"<section>\n<h2>{escape(h)}</h2>\n{b}\n</section>" for h, b in sections)
    text = (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n{lead}\n{body}\n</body>\n</html>\n"
    )
    return text.encode("utf-8", errors="backslashreplace")


def paragraph(text: str) -> str:
    """Plain text as a paragraph."""
    return f"<p>{escape(text)}</p>"


def figure(content: str, caption: str) -> str:
    """HTML or SVG with a plain-text caption below it."""
    return f"<figure>{content}\n<figcaption>{escape(caption)}</figcaption></figure>"


def html_table(header: Sequence[str], rows: Sequence[Sequence[object]], digits: int = 2) -> str:
    """A table; numbers stand to the right, a float with ``digits`` decimals, None as a dash.

    A column's heading stands where its first row's cell does.
    """
    first = rows[0] if rows else [""] * len(header)
    head = "".join(
        f"<th{_side(cell)}>{escape(name)}</th>" for name, cell in zip(header, first, strict=True)
    )
    body = "\n".join(
        f"<tr>{''.join(f'<td{_side(cell)}>{_text(cell, digits)}</td>' for cell in row)}</tr>"
        for row in rows
    )
    return f'<div class="wide"><table>\n<tr>{head}</tr>\n{body}\n</table></div>'


def line_chart(
    title: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x_label: str,
    y_label: str,
    log: bool = False,
    log_x: bool = False,
) -> str:
    """Lines through (x, y) points as inline SVG; short series get a mark at every point.

    Args:
        title: read out in place of the chart.
        series: points by name, drawn and listed in this order.
        x_label: text below the x axis.
        y_label: text above the y axis.
        log: whether the y axis is logarithmic. A value that has no place on the axis (not finite,
            or not above 0 on a logarithmic one) is left out.
        log_x: whether the x axis is logarithmic.
    """
    shown = {
        name: [(x, y) for x, y in points if math.isfinite(y) and (y > 0 or not log)]
        for name, points in series.items()
    }
    flat = [point for points in shown.values() for point in points]
    if not flat:
        return paragraph(f"{title}: no values to draw.")
    xs = axis_ticks(min(x for x, _ in flat), max(x for x, _ in flat), log=log_x)
    ys = axis_ticks(min(y for _, y in flat), max(y for _, y in flat), log=log)
    left, right, top = 62, WIDTH - 16, 18 * len(shown) + 34
    bottom = top + 210
    parts = []
    for index, name in enumerate(shown):
        key = f'<path class="line l{index % LINES}" d="M{left} {18 * index + 10}h30"/>'
        parts.append(f'{key}<text x="{left + 38}" y="{18 * index + 14}">{escape(name)}</text>')
    for tick in ys:
        at = _place(tick, ys, bottom, top, log=log)
        parts.append(f'<path class="rule" d="M{left} {at:.1f}H{right}"/>')
        parts.append(f'<text class="e" x="{left - 6}" y="{at + 4:.1f}">{tick:g}</text>')
    for tick in xs:
        at = _place(tick, xs, left, right, log=log_x)
        parts.append(f'<path class="axis" d="M{at:.1f} {bottom}v5"/>')
        parts.append(f'<text class="c" x="{at:.1f}" y="{bottom + 19}">{tick:g}</text>')
    parts.append(f'<path class="axis" d="M{left} {bottom}H{right}"/>')
    middle = (left + right) // 2
    parts.append(f'<text class="c" x="{middle}" y="{bottom + 38}">{escape(x_label)}</text>')
    parts.append(f'<text x="4" y="{top - 12}">{escape(y_label)}</text>')
    for index, (name, points) in enumerate(shown.items()):
        across = [f"{_place(x, xs, left, right, log=log_x):.1f}" for x, _ in points]
        down = [f"{_place(y, ys, bottom, top, log=log):.1f}" for _, y in points]
        line = " ".join(f"{x},{y}" for x, y in zip(across, down, strict=True))
        parts.append(f'<polyline class="line l{index % LINES}" points="{line}"/>')
        if len(points) <= MARKED:
            for (x, y), *place in zip(points, across, down, strict=True):
                mark = f'<circle class="m{index % LINES}" cx="{place[0]}" cy="{place[1]}" r="3">'
                parts.append(f"{mark}<title>{escape(name)}: {x:g}, {y:.4g}</title></circle>")
    return _svg(title, bottom + 46, parts)


def bar_chart(
    title: str, bars: Sequence[tuple[str, float, float]], *, limit: float, unit: str = ""
) -> str:
    """Horizontal bars from 0, with error bars, as inline SVG.

    Args:
        title: read out in place of the chart.
        bars: name, value and spread of each; the error bar reaches one spread to either side.
        limit: where the axis ends.
        unit: stands behind every value.
    """
    ticks = axis_ticks(0, limit)
    left, right, bottom = 16, WIDTH - 112, 44 * len(bars) + 6
    parts = []
    for tick in ticks:
        at = _place(tick, ticks, left, right)
        parts.append(f'<path class="rule" d="M{at:.1f} 4V{bottom}v5"/>')
        parts.append(f'<text class="c" x="{at:.1f}" y="{bottom + 19}">{tick:g}{unit}</text>')
    for index, (name, value, spread) in enumerate(bars):
        y, sides = 44 * index + 6, (max(value - spread, 0), value, value + spread)
        low, end, high = (_place(side, ticks, left, right) for side in sides)
        parts.append(f'<text x="{left + 4}" y="{y + 12}">{escape(name)}</text>')
        size = f'width="{end - left:.1f}" height="18"'
        parts.append(f'<rect class="bar" x="{left}" y="{y + 17}" {size}/>')
        if spread:
            ends = f"M{low:.1f} {y + 21}v10M{high:.1f} {y + 21}v10"
            parts.append(f'<path class="error" d="M{low:.1f} {y + 26}H{high:.1f}{ends}"/>')
        text = f"{value:.1f} ± {spread:.1f}{unit}" if spread else f"{value:.1f}{unit}"
        parts.append(f'<text x="{high + 8:.1f}" y="{y + 31}">{text}</text>')
    return _svg(title, bottom + 26, parts)


def contact_sheet(
    images: Sequence[npt.NDArray[np.uint8]], columns: int = 10, side: int = 64, gap: int = 2
) -> bytes:
    """Images of one shape in rows, as a PNG; between them it is transparent.

    Args:
        images: (H, W, C) uint8 each, with C = 1 or 3.
        columns: images a row.
        side: images are enlarged by the largest whole number that keeps them within this many
            pixels; larger ones stay as they are.
        gap: pixels between images.
    """
    height, width, channels = images[0].shape
    factor = max(1, side // max(height, width))
    height, width = height * factor, width * factor
    rows, columns = -(-len(images) // columns), min(columns, len(images))
    shape = (rows * (height + gap) - gap, columns * (width + gap) - gap, channels + 1)
    sheet = np.zeros(shape, np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        place = sheet[top : top + height, left : left + width]
        place[..., :-1] = image.repeat(factor, 0).repeat(factor, 1)
        place[..., -1] = 255
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, "PNG")
    return buffer.getvalue()


def png_image(png: bytes, text: str) -> str:
    """A PNG inside the page; ``text`` says what it shows to those who do not see it."""
    data = base64.b64encode(png).decode()
    with Image.open(io.BytesIO(png)) as image:
        width, height = image.size
    size = f'width="{width}" height="{height}"'
    return f'<img alt="{escape(text)}" {size} src="data:image/png;base64,{data}">'


def axis_ticks(low: float, high: float, *, log: bool = False) -> list[float]:
    """Round numbers from at or below ``low`` to at or above ``high``; never fewer than two."""
    if not log:
        rough = ((high - low) or abs(high) or 1.0) / 5
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        return [index * step for index in range(first, max(last, first + 1) + 1)]
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    if last - first > 3:
        every = -(-(last - first) // 8)
        return [10.0**power for power in range(first, last + every, every)]
    fine = [digit * 10.0**power for power in range(first, last + 1) for digit in (1, 2, 5)]
    start = max(index for index, value in enumerate(fine) if value <= low * (1 + 1e-9))
    stop = next(index for index, value in enumerate(fine) if value >= high * (1 - 1e-9))
    return fine[start : max(stop, start + 1) + 1]


def _place(
    value: float, ticks: Sequence[float], start: float, end: float, *, log: bool = False
) -> float:
    low, high = ticks[0], ticks[-1]
    if log:
        value, low, high = math.log10(value), math.log10(low), math.log10(high)
    return start + (end - start) * (value - low) / (high - low)


def _svg(title: str, height: int, parts: Sequence[str]) -> str:
    name = escape(title)
    return (
        f'<svg role="img" aria-label="{name}" viewBox="0 0 {WIDTH} {height}">\n'
        f"<title>{name}</title>\n" + "\n".join(parts) + "\n</svg>"
    )


def _side(cell: Any) -> str:
    return ' class="n"' if cell is None or isinstance(cell, int | float) else ""


def _text(cell: object, digits: int) -> str:
    if isinstance(cell, float):
        return f"{cell:,.{digits}f}"
    return (
        "&ndash;" if cell is None else f"{cell:,}" if isinstance(cell, int) else escape(str(cell))
    )
