"""Draw curves over steps as SVG text for a page that needs nothing else: no script, no font, no file."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 12, 26
_MOST_POINTS = 500  # of a curve; of a longer run each point is a mean over neighbours
COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f")

Points = Sequence[tuple[float, float]]
Place = Callable[[float, float], tuple[float, float]]  # from step and value to x and y


@dataclass(frozen=True)
class Chart:
    """Curves by name over the steps, and where phases begin (step, name). `levels` are values to draw a line at."""

    title: str
    curves: Mapping[str, Points]
    phases: Sequence[tuple[int, str]] = ()
    levels: Sequence[float] = ()

    def svg(self) -> str:
        """Return the chart with its title and a legend that says the last value of every curve."""
        thinned = {name: thin(points) for name, points in self.curves.items() if points}
        steps = [step for points in thinned.values() for step, _ in points]
        values = [value for points in thinned.values() for _, value in points]
        if not values:
            return ""
        low, high = padded(min(values), max(values))
        first, last = min(steps), max(max(steps), min(steps) + 1)

        def place(step: float, value: float) -> tuple[float, float]:
            x = _LEFT + (step - first) / (last - first) * (WIDTH - _LEFT - _RIGHT)
            return x, _TOP + (high - value) / (high - low) * (HEIGHT - _TOP - _BOTTOM)

        parts = [self._grid(low, high, first, last, place)]
        for number, (name, points) in enumerate(thinned.items()):
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
            colour, (x, y) = colour_of(number), place(*points[-1])
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.4" fill="{colour}"/>')
            parts += [_hover(place(*point), f"{name}, {_at(point)}") for point in points]
        legend = "".join(
            f'<span><i style="background:{colour_of(number)}"></i>{escape(name)} '
            f"<b>{number_text(points[-1][1])}</b></span>"
            for number, (name, points) in enumerate(thinned.items())
        )
        title, size = escape(self.title), f"0 0 {WIDTH} {HEIGHT}"
        body = f'<svg viewBox="{size}" role="img" aria-label="{title}">{"".join(parts)}</svg>'
        return f'<figure><figcaption>{title}</figcaption>{body}<div class="legend">{legend}</div></figure>'

    def _grid(self, low: float, high: float, first: float, last: float, place: Place) -> str:
        found, bottom = [], HEIGHT - _BOTTOM
        for value in ticks(low, high):
            _, y = place(first, value)
            found.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            found.append(f'<text x="{_LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{number_text(value)}</text>')
        for level in self.levels:
            if low <= level <= high:
                _, y = place(first, level)
                found.append(f'<line class="level" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        for step in (step for step in ticks(first, last) if step == int(step)):
            x, _ = place(step, low)
            found.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{step:,.0f}</text>')
        for step, name in self.phases:
            if first <= step <= last:
                x, _ = place(step, low)
                found.append(f'<line class="phase" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}"/>')
                found.append(f'<text class="phase" x="{x + 4:.1f}" y="{_TOP + 9}">{escape(name)}</text>')
        return "".join(found)


def _hover(at: tuple[float, float], text: str) -> str:
    x, y = at
    return f'<circle class="hover" cx="{x:.1f}" cy="{y:.1f}" r="5"><title>{escape(text)}</title></circle>'


def _at(point: tuple[float, float]) -> str:
    return f"step {point[0]:,.0f}: {number_text(point[1])}"


def colour_of(number: int) -> str:
    """Return the colour of the n-th curve of a chart."""
    return COLOURS[number % len(COLOURS)]


def thin(points: Points) -> Points:
    """Return at most _MOST_POINTS: means over equal runs of points, at the step of each run's last."""
    run = -(-len(points) // _MOST_POINTS)
    groups = [points[start : start + run] for start in range(0, len(points), run or 1)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def padded(low: float, high: float) -> tuple[float, float]:
    """Return a range with some air around it, and of some height where all values are one."""
    air = (high - low) * 0.06 or abs(high) * 0.05 or 1.0
    return low - air, high + air


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return round numbers in a range, about `count` of them."""
    raw = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw * 0.999)
    start = math.ceil(low / step - 1e-9)
    return [step * number for number in range(start, math.floor(high / step + 1e-9) + 1)]


def number_text(value: float) -> str:
    """Write a number with four digits that count."""
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}"
    digits = 0 if not value else max(0, 3 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def table_html(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; all text is escaped."""
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
