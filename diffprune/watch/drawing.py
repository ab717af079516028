"""Two small drawings of a live page as SVG text: lines of losses, points of methods. Written straight, as matplotlib takes a third
of a second for each, which a run would pay for every few seconds."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence

from diffprune.report.analysis.labels import COLORS
from diffprune.report.render.escape import plain
from diffprune.watch.snapshot import Curve, Point

WIDTH, HEIGHT, LEFT, BOTTOM, EDGE = 560, 260, 46, 34, 16  # px
TICKS = 5
Series = Mapping[str, Sequence[tuple[float, float]]]


def losses(curves: Sequence[Curve]) -> str:
    """Loss by training step, a line per scorer; "" where there is none."""
    lines = {curve.scorer: curve.points for curve in curves if curve.points}
    return _drawn(lines, "training step", "loss, nats per token", "polyline") if lines else ""


def accuracies(points: Sequence[Point]) -> str:
    """Accuracy by visual tokens kept, as methods come in."""
    lines = _by_method(points, lambda point: point.kept)
    return _drawn(lines, "visual tokens kept", "accuracy, %", "both") if lines else ""


def pareto(points: Sequence[Point]) -> str:
    """Accuracy by net prefill speedup, of what was measured; the unpruned model stands at 1."""
    measured = [point for point in points if point.speedup is not None]
    bounds = [point.model_copy(update={"speedup": 1.0}) for point in points if point.bound] if measured else []
    lines = _by_method([*bounds, *measured], lambda point: point.speedup or math.nan)
    return _drawn(lines, "net prefill speedup, ×", "accuracy, %", "both") if lines else ""


def _by_method(points: Sequence[Point], across: Callable[[Point], float]) -> dict[str, list[tuple[float, float]]]:
    found: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        found.setdefault(point.method, []).append((across(point), 100 * point.accuracy))
    return {method: sorted(places) for method, places in found.items()}


def _drawn(lines: Series, x_label: str, y_label: str, how: str) -> str:
    """Axes with ticks, and each series in a colour of its own with its name in a legend below."""
    xs = [x for places in lines.values() for x, _ in places]
    ys = [y for places in lines.values() for _, y in places]
    x_ticks, y_ticks = _ticks(min(xs), max(xs)), _ticks(min(ys), max(ys))
    rows = math.ceil(len(lines) / 2)

    def at(x: float, y: float) -> tuple[float, float]:
        right = (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (WIDTH - LEFT - EDGE)
        up = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (HEIGHT - BOTTOM - EDGE)
        return round(LEFT + right, 1), round(HEIGHT - BOTTOM - up, 1)

    name = html.escape(f"{y_label} by {x_label}")
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT + 16 * rows}" role="img" aria-label="{name}">']
    for value in y_ticks:
        _, y = at(x_ticks[0], value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - EDGE}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y + 4}" text-anchor="end">{value:g}</text>')
    for value in x_ticks:
        x, _ = at(value, y_ticks[0])
        parts.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{value:g}</text>')
    parts.append(f'<text x="{WIDTH - EDGE}" y="{HEIGHT - 5}" text-anchor="end">{html.escape(x_label)}</text>')
    parts.append(f'<text x="{LEFT}" y="{HEIGHT - 5}">{html.escape(y_label)}, upwards</text>')
    for number, (name, places) in enumerate(lines.items()):
        color = COLORS[number % len(COLORS)]
        dash = "" if number < len(COLORS) else f' stroke-dasharray="{2 + number // len(COLORS)} 3"'
        drawn = [at(x, y) for x, y in places]
        parts.append(f'<polyline fill="none" stroke="{color}"{dash} points="{" ".join(f"{x},{y}" for x, y in drawn)}"/>')
        marks = drawn if how == "both" or len(drawn) == 1 else []
        parts += [f'<circle cx="{x}" cy="{y}" r="3.5" fill="{color}"/>' for x, y in marks]
        x, y = LEFT + (number % 2) * (WIDTH - LEFT) // 2, HEIGHT + 12 + 16 * (number // 2)
        parts.append(f'<rect x="{x}" y="{y - 9}" width="12" height="9" fill="{color}"/>')
        parts.append(f'<text x="{x + 17}" y="{y}">{html.escape(plain(name, 34))}</text>')
    return "".join([*parts, "</svg>"])


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers around a range: a step of 1, 2 or 5 times a power of ten."""
    span = (high - low) or max(abs(high), 1.0) / 10
    raw = span / (TICKS - 1)
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * size for size in (1, 2, 5, 10) if power * size >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * i, 10) for i in range(first, max(last, first + 1) + 1)]
