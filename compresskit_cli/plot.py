"""The front of a plan as a picture: an SVG, which every browser shows and no library has to draw."""

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compresskit import Plan

WIDTH, HEIGHT, MARGIN = 640, 400, 60
TICKS = 5


def front_svg(plan: "Plan") -> str:
    """Expected error against parameters; the plan itself as a filled point, its ratio beside it.

    Where multiply-adds or time were limited, sizes hardly differ: the front is then drawn against the expected time.
    """
    points = plan.front
    sizes = [point.params for point in points]
    by_time = max(sizes) - min(sizes) < 0.02 * plan.params_after
    values = [point.time_ns / 1e6 if by_time else point.params / 1e6 for point in points]
    x, y = _Scale(values, MARGIN, WIDTH - MARGIN), _Scale([p.error for p in points], HEIGHT - MARGIN, MARGIN)
    places = [(x.at(value), y.at(point.error)) for value, point in zip(values, points, strict=True)]
    path = " ".join(f"{'L' if i else 'M'}{left:.1f},{top:.1f}" for i, (left, top) in enumerate(places))
    parts = [f'<path d="{path}" fill="none" stroke="#36c" stroke-width="2"/>']
    chosen = min(range(len(points)), key=lambda i: abs(points[i].params - plan.params_after))
    for i, ((left, top), point) in enumerate(zip(places, points, strict=True)):
        fill = "#36c" if i == chosen else "#fff"
        parts.append(f'<circle cx="{left:.1f}" cy="{top:.1f}" r="4" fill="{fill}" stroke="#36c"/>')
        parts.append(_text(left + 6, top - 6, f"{point.ratio:.2f} x"))
    for value in x.ticks():
        parts.append(_text(x.at(value), HEIGHT - MARGIN + 18, f"{value:.3g}", "middle"))
    for value in y.ticks():
        parts.append(_text(MARGIN - 8, y.at(value) + 4, f"{value:.3f}", "end"))
    label = (
        f"expected ms of the layers, {plan.target.tokens:,} tokens" if by_time else "parameters of the model, millions"
    )
    parts.append(_text(WIDTH / 2, HEIGHT - 14, label, "middle"))
    parts.append(_text(MARGIN, MARGIN - 24, "expected relative error (root mean square)"))
    frame = f'<path d="M{MARGIN},{MARGIN}V{HEIGHT - MARGIN}H{WIDTH - MARGIN}" fill="none" stroke="#888"/>'
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    body = "\n".join([frame, *parts])
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">\n{body}\n</svg>\n'


class _Scale:
    """From values to places on the page."""

    def __init__(self, values: Sequence[float], start: float, stop: float) -> None:
        self._low, self._high = min(values), max(values)
        self._start, self._stop = start, stop

    def at(self, value: float) -> float:
        span = self._high - self._low
        share = (value - self._low) / span if span else 0.5
        return self._start + share * (self._stop - self._start)

    def ticks(self) -> list[float]:
        step = (self._high - self._low) / (TICKS - 1)
        return [self._low + i * step for i in range(TICKS)] if step else [self._low]


def _text(left: float, top: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{left:.1f}" y="{top:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
