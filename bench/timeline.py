"""A step as bars: a lane for each stream, and for the processor where it attends; a bar for each
copy or computation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from sl_serve.device import Span

STREAMS = ("load", "compute", "store")
PROCESSOR = "host"
COLOURS = {
    "weights": "#4878a8",
    "KV prefix": "#8fb8d8",
    "expansion": "#b03060",
    "layer": "#c8603c",
    "attention": "#e0a070",
    "new KV": "#6a9a58",
    "hidden states": "#8060a8",
}
OTHER_COLOUR = "#999999"
WIDTH, LEFT, LANE, TOP = 1200, 80, 40, 30


@dataclass(frozen=True, slots=True)
class Timeline:
    """The spans of one step, in seconds from its first."""

    spans: list[Span]
    length_s: float

    @classmethod
    def of(cls, spans: Sequence[Span]) -> Timeline:
        first_s = min((s.start_s for s in spans), default=0.0)
        moved = [s._replace(start_s=s.start_s - first_s, stop_s=s.stop_s - first_s) for s in spans]
        return cls(moved, max((s.stop_s for s in moved), default=0.0))

    @property
    def lanes(self) -> tuple[str, ...]:
        attends = any(s.stream == PROCESSOR for s in self.spans)
        return (*STREAMS, PROCESSOR) if attends else STREAMS

    def busy_share(self, stream: str) -> float:
        """Of the step's length, 0 for an empty one."""
        busy_s = sum(s.stop_s - s.start_s for s in self.spans if s.stream == stream)
        return busy_s / self.length_s if self.length_s else 0.0

    def as_json(self) -> dict[str, Any]:
        shares = {lane: self.busy_share(lane) for lane in self.lanes}
        spans = [span._asdict() for span in self.spans]
        return {"length_s": self.length_s, "busy_share": shares, "spans": spans}


def draw(timeline: Timeline, title: str) -> str:
    """An SVG image."""
    lanes = timeline.lanes
    height = TOP + LANE * len(lanes) + 50
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="{LEFT}" y="18" font-size="14">{escape(title)}</text>',
    ]
    for i, lane in enumerate(lanes):
        y = TOP + LANE * i
        parts.append(f'<text x="4" y="{y + 24}">{lane} {timeline.busy_share(lane):.0%}</text>')
    parts += [_bar(s, lanes.index(s.stream), timeline.length_s) for s in timeline.spans]
    parts += _axis(timeline.length_s, TOP + LANE * len(lanes))
    parts += _legend({s.name for s in timeline.spans}, height - 10)
    return "\n".join([*parts, "</svg>\n"])


def _x(at_s: float, length_s: float) -> float:
    return LEFT + (WIDTH - LEFT - 10) * at_s / (length_s or 1.0)


def _bar(span: Span, lane: int, length_s: float) -> str:
    x = _x(span.start_s, length_s)
    width = max(0.5, _x(span.stop_s, length_s) - x)
    milliseconds = (span.stop_s - span.start_s) * 1e3
    return (
        f'<rect x="{x:.2f}" y="{TOP + LANE * lane + 4}" width="{width:.2f}" '
        f'height="{LANE - 8}" fill="{COLOURS.get(span.name, OTHER_COLOUR)}">'
        f"<title>{escape(span.name)}: {milliseconds:.3f} ms</title></rect>"
    )


def _axis(length_s: float, y: int) -> list[str]:
    return [
        f'<text x="{_x(length_s * i / 10, length_s):.1f}" y="{y + 14}" text-anchor="middle">'
        f"{length_s * i / 10 * 1e3:.1f} ms</text>"
        for i in range(1, 10)
    ]


def _legend(names: set[str], y: int) -> list[str]:
    parts = []
    for i, name in enumerate(n for n in COLOURS if n in names):
        x = LEFT + 120 * i
        parts.append(
            f'<rect x="{x}" y="{y - 10}" width="10" height="10" fill="{COLOURS[name]}"/>'
            f'<text x="{x + 14}" y="{y}">{escape(name)}</text>'
        )
    return parts
