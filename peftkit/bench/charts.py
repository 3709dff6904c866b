"""Charts as SVG that stands inside a page: nothing but shapes, text and titles that show where the pointer rests."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil, floor, log10

from peftkit.pages import safe

COLOURS = (
    "#3b6fb6", "#d1603d", "#2f8f6b", "#8a5bb5", "#c29a17", "#5b7f95", "#c2498f", "#6f7d2f", "#2aa5b8", "#8d5a3b",
)  # fmt: skip
INK, FAINT, GRID = "#44525f", "#8895a1", "#e6ebf0"
LEFT, RIGHT, TOP, BOTTOM = 56, 14, 10, 40
DASHES = ("", "6 3", "2 3")


@dataclass(frozen=True)
class Point:
    """A mark in a chart; `style` is the place of its method among all, which decides its colour and shape."""

    name: str
    x: float
    y: float
    style: int
    low: float | None = None
    high: float | None = None
    note: str = ""
    each: tuple[float, ...] = ()
    """What x is the mean of."""


@dataclass(frozen=True)
class Line:
    """A curve through points, by x."""

    name: str
    points: tuple[tuple[float, float], ...]
    style: int


@dataclass(frozen=True)
class Axis:
    """From data to a coordinate."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def at(self, value: float) -> float:
        """The coordinate of a value."""
        low, high, here = (log10(one) if self.logarithmic else one for one in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (here - low) / (high - low)

    def ticks(self) -> list[float]:
        """Round values between the ends."""
        if self.logarithmic:
            powers = range(floor(log10(self.low)), ceil(log10(self.high)) + 1)
            parts = (1, 2, 5) if log10(self.high / self.low) < 2 else (1,)
            return [part * 10.0**power for power in powers for part in parts if self.holds(part * 10.0**power)]
        rough = (self.high - self.low) / 4
        unit = 10.0 ** floor(log10(rough))
        step = next(one * unit for one in (1, 2, 2.5, 5, 10) if one * unit >= rough * 0.999)
        first = ceil(self.low / step - 1e-9)
        return [number * step for number in range(first, floor(self.high / step + 1e-9) + 1)]

    def holds(self, value: float) -> bool:
        """Whether a value lies on it."""
        return self.low * (1 - 1e-9) <= value <= self.high * (1 + 1e-9)


def axis(values: Sequence[float], start: float, end: float, logarithmic: bool = False) -> Axis:
    """Long enough for the values and some air; logarithmic only where all are above 0."""
    low, high = min(values), max(values)
    if logarithmic and low > 0:
        return Axis(low / 1.5, high * 1.5, start, end, True)
    air = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return Axis(low - air, high + air, start, end)


def intervals(points: Sequence[Point], label: str, lines: Sequence[tuple[str, float]] = (), percent: float = 1) -> str:
    """Lying intervals, one a row, the first on top, with what each is a mean of; `lines` are levels to compare with."""
    if not points:
        return ""
    ends = [one for point in points for one in (point.low, point.high, *point.each) if one is not None]
    levels = [(name, value) for name, value in lines if _near(value, ends)]
    name_width = min(230, 24 + max(7 * len(_short(point.name)) for point in points))
    top, width = 4 + 13 * len(levels), 720
    bottom, height = top + 24 * len(points) + 4, top + 24 * len(points) + 44
    scale = axis([*ends, *(value for _, value in levels)], name_width, width - 20)
    parts = [*_upright_grid(scale, top, bottom, percent)]
    for index, (name, value) in enumerate(levels):
        x, y = scale.at(value), 12 + 13 * index
        anchor = "start" if x < (name_width + width) / 2 else "end"
        parts.append(_path(f"M{x:.1f} {y - 8}V{bottom}", FAINT, 1.2, "4 3"))
        shift = 5 if anchor == "start" else -5
        style = f'text-anchor="{anchor}" font-style="italic"'
        parts.append(f'<text x="{x + shift:.1f}" y="{y}" {style}>{safe(_short(name))}</text>')
    for index, point in enumerate(points):
        y, colour = top + 16 + 24 * index, COLOURS[point.style % len(COLOURS)]
        parts.append(f'<text x="{name_width - 10}" y="{y + 4}" text-anchor="end">{safe(_short(point.name))}</text>')
        bar = ""
        if point.low is not None and point.high is not None:
            bar = _path(f"M{scale.at(point.low):.1f} {y}H{scale.at(point.high):.1f}", colour, 5, opacity=0.35)
        each = "".join(_mark(scale.at(one), y, point.style, 1.8) for one in point.each if len(point.each) > 1)
        mean = _mark(scale.at(point.x), y, point.style)
        parts.append(f"<g>{_title(point.note or point.name)}{bar}{each}{mean}</g>")
    parts.append(f'<text x="{(name_width + width) / 2:.0f}" y="{height - 6}" text-anchor="middle">{safe(label)}</text>')
    return _svg(width, height, label, parts)


def lines(series: Sequence[Line], x_label: str, y_label: str, percent: float = 1, names: Sequence[str] = ()) -> str:
    """Curves over a common axis; with `names`, x counts through them, else it is a number."""
    points = [point for line in series for point in line.points]
    if not points:
        return ""
    width, height = 420, 280
    across = axis([x for x, _ in points], LEFT, width - RIGHT)
    up = axis([y for _, y in points], height - BOTTOM, TOP)
    parts = [*_frame(across, up, width, height, x_label, y_label, percent, names)]
    for line in series:
        colour = COLOURS[line.style % len(COLOURS)]
        route = "L".join(f"{across.at(x):.1f} {up.at(y):.1f}" for x, y in line.points)
        dash = DASHES[line.style // len(COLOURS) % len(DASHES)]
        ends = "".join(_mark(across.at(x), up.at(y), line.style, 2.6) for x, y in line.points)
        parts.append(f"<g>{_title(line.name)}{_path(f'M{route}', colour, 1.8, dash)}{ends}</g>")
    return _svg(width, height, f"{y_label} over {x_label}", parts)


def scatter(
    points: Sequence[Point],
    x_label: str,
    y_label: str,
    front: Sequence[str] = (),
    percent: float = 1,
    logarithmic: bool = False,
    x_percent: float = 1,
) -> str:
    """Marks, the names of those on the front beside them, and the front as a line from left to right."""
    if not points:
        return ""
    width, height = 420, 290
    across = axis([point.x for point in points], LEFT, width - RIGHT, logarithmic)
    up = axis([point.y for point in points], height - BOTTOM, TOP)
    parts = [*_frame(across, up, width, height, x_label, y_label, percent, x_percent=x_percent)]
    on_front = sorted((point for point in points if point.name in front), key=lambda one: (one.x, one.y))
    if len(on_front) > 1:
        route = "L".join(f"{across.at(one.x):.1f} {up.at(one.y):.1f}" for one in on_front)
        parts.append(_path(f"M{route}", FAINT, 1.2, "5 3"))
    for point in points:
        parts.append(
            f"<g>{_title(point.note or point.name)}{_mark(across.at(point.x), up.at(point.y), point.style)}</g>"
        )
    named = on_front or points
    boxes = [(across.at(point.x) - 5, up.at(point.y) - 5, 10.0, 10.0) for point in points]
    parts += _names(((point.name, across.at(point.x), up.at(point.y)) for point in named), boxes, width)
    return _svg(width, height, f"{y_label} over {x_label}", parts)


def legend(entries: Sequence[tuple[str, int]], width: int = 860) -> str:
    """Names with their marks, in rows."""
    parts, x, y = [], 8.0, 14.0
    for name, style in entries:
        wide = 26 + 6.6 * len(_short(name))
        if x + wide > width:
            x, y = 8.0, y + 20
        parts.append(f'{_mark(x + 5, y, style)}<text x="{x + 14:.1f}" y="{y + 4:.1f}">{safe(_short(name))}</text>')
        x += wide
    return _svg(width, int(y + 12), "methods", parts)


def _names(
    wanted: Iterable[tuple[str, float, float]], taken: list[tuple[float, float, float, float]], width: int
) -> Iterator[str]:
    """Each beside its mark, where no other name or mark is; one that has no room is left to its title."""
    for name, x, y in wanted:
        text = _short(name)
        wide = 6.2 * len(text)
        for left, top in ((x + 7, y - 7), (x - 7 - wide, y - 7), (x - wide / 2, y - 20), (x - wide / 2, y + 7)):
            inside = left >= LEFT and left + wide <= width - 2 and top >= 0
            if inside and not any(_overlap((left, top, wide, 13), one) for one in taken):
                taken.append((left, top, wide, 13))
                yield f'<text x="{left:.1f}" y="{top + 10.5:.1f}">{safe(text)}</text>'
                break


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return (
        one[0] < other[0] + other[2]
        and other[0] < one[0] + one[2]
        and one[1] < other[1] + other[3]
        and other[1] < one[1] + one[3]
    )


def _frame(
    across: Axis,
    up: Axis,
    width: int,
    height: int,
    x_label: str,
    y_label: str,
    percent: float,
    names: Sequence[str] = (),
    x_percent: float = 1,
) -> Iterator[str]:
    bottom = height - BOTTOM
    ticks = up.ticks()
    for value in ticks:
        y = up.at(value)
        yield _path(f"M{LEFT} {y:.1f}H{width - RIGHT}", GRID, 1)
        yield f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_number(value * percent)}</text>'
    places = [(float(index), name) for index, name in enumerate(names)]
    for value, shown in places or [(value, _number(value * x_percent)) for value in across.ticks()]:
        if names and not across.low <= value <= across.high:
            continue
        yield f'<text x="{across.at(value):.1f}" y="{bottom + 15}" text-anchor="middle">{safe(shown)}</text>'
    yield _path(f"M{LEFT} {TOP}V{bottom}H{width - RIGHT}", FAINT, 1)
    yield f'<text x="{(LEFT + width) / 2:.0f}" y="{height - 6}" text-anchor="middle">{safe(x_label)}</text>'
    middle = (TOP + bottom) / 2
    yield f'<text transform="translate(12 {middle:.0f}) rotate(-90)" text-anchor="middle">{safe(y_label)}</text>'


def _upright_grid(scale: Axis, top: float, bottom: float, percent: float) -> Iterator[str]:
    for value in scale.ticks():
        x = scale.at(value)
        yield _path(f"M{x:.1f} {top}V{bottom}", GRID, 1)
        yield f'<text x="{x:.1f}" y="{bottom + 15}" text-anchor="middle">{_number(value * percent)}</text>'


def _near(value: float, ends: Sequence[float]) -> bool:
    """Whether a level may be shown without pressing the intervals together."""
    low, high = min(ends), max(ends)
    return low - 0.6 * (high - low) <= value <= high + 0.6 * (high - low)


def _mark(x: float, y: float, style: int, size: float = 4.2) -> str:
    colour = COLOURS[style % len(COLOURS)]
    shape = style // len(COLOURS) % 3
    if shape == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size:g}" fill="{colour}"/>'
    if shape == 1:
        return f'<path d="M{x - size:.1f} {y - size:.1f}h{2 * size:g}v{2 * size:g}h-{2 * size:g}z" fill="{colour}"/>'
    reach = 1.4 * size
    route = f"M{x:.1f} {y - reach:.1f}l{reach:g} {reach:g}l-{reach:g} {reach:g}l-{reach:g} -{reach:g}z"
    return f'<path d="{route}" fill="{colour}"/>'


def _path(route: str, colour: str, width: float, dash: str = "", opacity: float = 1) -> str:
    more = f' stroke-dasharray="{dash}"' if dash else ""
    more += f' stroke-opacity="{opacity:g}"' if opacity < 1 else ""
    return f'<path d="{route}" fill="none" stroke="{colour}" stroke-width="{width:g}"{more}/>'


def _title(text: str) -> str:
    return f"<title>{safe(text)}</title>"


def _svg(width: int, height: int, label: str, parts: Iterable[str]) -> str:
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return f'<svg {size} role="img" aria-label="{safe(label)}">{"".join(parts)}</svg>'


def _short(name: str) -> str:
    return name if len(name) <= 28 else f"{name[:27]}…"


def _number(value: float) -> str:
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{letter}"
    return f"{value:.4g}".replace("-", "−")
