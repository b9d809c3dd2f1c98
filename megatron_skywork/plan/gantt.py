"""The picture of a pipeline's step: a row per stage with its forwards (F), backwards (B) and weights' parts (W), idle time left empty, and below what it holds.

`page` is one HTML file that loads nothing from anywhere; its picture is an SVG, follows the screen's light or dark setting and names every bar when pointed
at. `png` draws the same with matplotlib, where the extra `plot` is installed.
"""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from megatron_skywork.errors import ConfigError
from megatron_skywork.plan.simulation import Event, PieceCost, Timeline, memory_over_time

COLOURS = {"F": "#2b6cb0", "B": "#b8501f", "W": "#2f7d5b"}
WORDS = {"F": "forward", "B": "backward", "W": "weights' part of backward"}
# More bars than this are slow to show and too thin to see.
MOST_EVENTS = 8000
LEFT, RIGHT, TOP, WIDTH = 78, 118, 82, 1180
UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
SIZES = ((2.0**40, "TiB"), (2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "B"))

STYLE = """
.pipeline { --ink: #22303c; --muted: #66727f; --rule: #e3e7ec; --idle: #eef1f4; --card: #ffffff; --area: #8aa4bd; }
@media (prefers-color-scheme: dark) {
  .pipeline { --ink: #dfe5ea; --muted: #93a0ad; --rule: #2b343d; --idle: #232c35; --card: #1a2128; --area: #55718c; }
}
.pipeline text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: var(--ink); }
.pipeline .muted { fill: var(--muted); }
.pipeline .title { font-size: 16px; font-weight: 600; }
.pipeline .number { fill: #ffffff; font-size: 10px; text-anchor: middle; pointer-events: none; }
.pipeline .idle { fill: var(--idle); }
.pipeline .grid { stroke: var(--rule); }
.pipeline .area { fill: var(--area); }
.pipeline .bar { stroke: var(--card); stroke-width: .5; }
"""


@dataclass(frozen=True)
class _View:
    """What of a timeline is drawn: from 0 to `seconds`, in `unit`; rows are `height` high."""

    seconds: float
    unit: float
    unit_name: str
    height: float

    def x(self, moment: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * moment / self.seconds


def svg(timeline: Timeline, pieces: Sequence[PieceCost], *, title: str) -> str:
    """The picture as an SVG element, for a page that has `STYLE`.

    Args:
        timeline: simulated with `keep_events=True`. Of a long step the beginning is drawn, and the picture says so.
        pieces: those it was simulated with.
        title: any text.

    Raises:
        ConfigError: the timeline has no events.
    """
    view, stages = _view(timeline), len(timeline.stages)
    memory_top = TOP + stages * view.height + 58
    height = memory_top + stages * view.height + 26
    parts = [
        f'<svg class="pipeline" viewBox="0 0 {WIDTH} {height:.0f}" width="100%" role="img" aria-label="{escape(_summary(timeline, title))}">',
        f'<text class="title" x="{LEFT}" y="22">{escape(title)}</text>',
        f'<text class="muted" x="{LEFT}" y="42">{escape(_summary(timeline, ""))}</text>',
        *_legend(timeline, len(pieces) // stages),
        *_axis(view, memory_top - 58),
    ]
    for number, stage in enumerate(timeline.stages):
        top = TOP + number * view.height
        parts += [f'<rect class="idle" x="{LEFT}" y="{top + 1:.1f}" width="{WIDTH - LEFT - RIGHT}" height="{view.height - 2:.1f}"/>',
                  *_label(view, top, f"stage {number + 1}", f"idle {stage.idle_seconds / timeline.seconds:.1%}"), *_bars(view, top, stage.events)]  # fmt: skip
    peak = max(stage.peak_bytes for stage in timeline.stages)
    parts.append(f'<text class="muted" x="{LEFT}" y="{memory_top - 10:.1f}">held by micro-batches between forward and backward, all rows to one scale</text>')
    for number, line in enumerate(memory_over_time(timeline, pieces)):
        top = memory_top + number * view.height
        parts += [*_label(view, top, f"stage {number + 1}", f"peak {_size(timeline.stages[number].peak_bytes)}"), _area(view, top, line, peak)]
    return "\n".join([*parts, "</svg>"])


def page(timeline: Timeline, pieces: Sequence[PieceCost], *, title: str) -> str:
    """The picture as a whole HTML page; arguments and errors as of `svg`."""
    body = "body { margin: 24px; background: #ffffff; color-scheme: light dark; } @media (prefers-color-scheme: dark) { body { background: #1a2128; } }"
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(title)}</title><style>{body}{STYLE}</style></head>\n<body>{svg(timeline, pieces, title=title)}</body></html>\n")  # fmt: skip


def png(timeline: Timeline, pieces: Sequence[PieceCost], *, title: str) -> bytes:
    """The picture as a PNG file's content, on white; arguments as of `svg`.

    Raises:
        ConfigError: matplotlib is not installed, or the timeline has no events.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("a PNG of the pipeline needs matplotlib, which is not installed; pip install 'megatron_skywork[plot]', or ask for .html")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    view, stages, chunks = _view(timeline), len(timeline.stages), len(pieces) // len(timeline.stages)
    figure = Figure(figsize=(WIDTH / 100, 1.6 + 2 * stages * view.height / 100), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True)
    figure.suptitle(_plain(title), x=0.01, ha="left", fontsize=11)
    above.set_title(_plain(_summary(timeline, "")), loc="left", fontsize=8.5, color="#66727f")
    _draw_rows(above, view, timeline)
    peak = max(stage.peak_bytes for stage in timeline.stages) or 1.0
    for number, line in enumerate(memory_over_time(timeline, pieces)):
        moments = [moment / view.unit for moment, _ in line] + [timeline.seconds / view.unit]
        levels = [number + 0.45 - 0.9 * level / peak for _, level in line]
        below.fill_between(moments, [number + 0.45] * len(moments), [*levels, levels[-1]], step="post", color="#8aa4bd", linewidth=0)
    below.set_xlabel(f"time ({view.unit_name})")
    below.set_title("held by micro-batches between forward and backward, all rows to one scale", loc="left", fontsize=8.5, color="#66727f")
    rights = ([f"idle {stage.idle_seconds / timeline.seconds:.1%}" for stage in timeline.stages],
              [f"peak {_size(stage.peak_bytes)}" for stage in timeline.stages])  # fmt: skip
    for axes, words in zip((above, below), rights, strict=True):
        axes.set_yticks(range(stages), [f"stage {number + 1}" for number in range(stages)], fontsize=8)
        axes.set_xlim(0, view.seconds / view.unit)
        axes.set_ylim(stages - 0.5, -0.5)
        axes.tick_params(length=0, labelsize=8)
        axes.spines[["top", "right", "left"]].set_visible(False)
        for number, word in enumerate(words):
            axes.text(1.005, number, word, transform=axes.get_yaxis_transform(), fontsize=8, va="center", color="#66727f")
    handles = [Patch(facecolor=_mixed(kind, chunk, chunks), label=text) for kind, chunk, text in _kinds(timeline, chunks)]
    figure.legend(handles=[*handles, Patch(facecolor="#eef1f4", label="idle")], loc="outside lower left", ncols=8, frameon=False, fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150)
    return file.getvalue()


# ---------------------------------------------------------------------------------------------------------------------------- what to draw


def _view(timeline: Timeline) -> _View:
    if not all(stage.events for stage in timeline.stages):
        raise ConfigError("a pipeline's picture needs its events; simulate(..., keep_events=True)")
    most = MOST_EVENTS // len(timeline.stages)
    ends = [stage.events[most].end for stage in timeline.stages if len(stage.events) > most]
    seconds = min([timeline.seconds, *ends])
    unit, name = next((pair for pair in UNITS if seconds >= pair[0]), UNITS[-1])
    return _View(seconds, unit, name, max(9.0, min(26.0, 480 / len(timeline.stages))))


def _summary(timeline: Timeline, title: str) -> str:
    view = _view(timeline)
    shown = "" if view.seconds == timeline.seconds else f", of which the first {view.seconds / view.unit:.4g} {view.unit_name} are shown"
    unit, name = next((pair for pair in UNITS if timeline.seconds >= pair[0]), UNITS[-1])
    text = f"step {timeline.seconds / unit:.4g} {name}{shown}; bubble (idle share of all stages) {timeline.bubble:.1%}"
    return f"{title}: {text}" if title else text


def _kinds(timeline: Timeline, chunks: int) -> Iterator[tuple[str, int, str]]:
    """Kind, chunk and name of everything that has a colour of its own."""
    kinds = {event.op.kind for stage in timeline.stages for event in stage.events}
    for kind in (kind for kind in WORDS if kind in kinds):
        for chunk in range(chunks):
            yield kind, chunk, WORDS[kind] + (f", chunk {chunk}" if chunks > 1 else "")


def _mixed(kind: str, chunk: int, chunks: int) -> str:
    """A kind's colour, darker for later chunks; white numbers stay readable on all."""
    share = 1 - 0.5 * chunk / max(1, chunks - 1)
    return "#" + "".join(f"{round(int(COLOURS[kind][place : place + 2], 16) * share):02x}" for place in (1, 3, 5))


def _size(num_bytes: float) -> str:
    scale, name = next((pair for pair in SIZES if num_bytes >= pair[0]), SIZES[-1])
    return f"{num_bytes / scale:.3g} {name}"


def _ticks(end: float) -> list[float]:
    """About ten round numbers from 0 to `end`."""
    step = 10 ** math.floor(math.log10(end / 8))
    step *= next(factor for factor in (1, 2, 5, 10) if end / (step * factor) <= 12)
    return [step * number for number in range(int(end / step + 1e-9) + 1)]


def _plain(text: str) -> str:
    """For matplotlib, which takes dollars for formulas."""
    return text.replace("$", r"\$")


# -------------------------------------------------------------------------------------------------------------------------- parts of the SVG


def _legend(timeline: Timeline, chunks: int) -> Iterator[str]:
    x = float(LEFT)
    entries = [(_mixed(kind, chunk, chunks), name) for kind, chunk, name in _kinds(timeline, chunks)]
    # A line has room for four; of many chunks the first and the last say enough.
    if len(entries) > 4:
        entries = [entry for index, entry in enumerate(entries) if index % chunks in (0, chunks - 1)]
    for colour, name in [*entries, ("var(--idle)", "idle; numbers are micro-batches, from 0")]:
        yield f'<rect x="{x:.0f}" y="54" width="12" height="12" fill="{colour}"/><text class="muted" x="{x + 16:.0f}" y="64">{escape(name)}</text>'
        x += 34 + 6.1 * len(name)


def _axis(view: _View, bottom: float) -> Iterator[str]:
    for tick in _ticks(view.seconds / view.unit):
        x = view.x(tick * view.unit)
        yield f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 4}" y2="{bottom + 4:.1f}"/>'
        yield f'<text class="muted" x="{x:.1f}" y="{bottom + 18:.1f}" text-anchor="middle">{tick:.6g}</text>'
    yield f'<text class="muted" x="{WIDTH - RIGHT + 8}" y="{bottom + 18:.1f}">time ({view.unit_name})</text>'


def _label(view: _View, top: float, left: str, right: str) -> Iterator[str]:
    middle, size = top + view.height / 2, min(12.0, view.height - 1)
    yield f'<text x="{LEFT - 8}" y="{middle:.1f}" dy=".35em" text-anchor="end" style="font-size:{size:.0f}px">{left}</text>'
    yield f'<text class="muted" x="{WIDTH - RIGHT + 8}" y="{middle:.1f}" dy=".35em" style="font-size:{size:.0f}px">{right}</text>'


def _bars(view: _View, top: float, events: Sequence[Event]) -> Iterator[str]:
    chunks = 1 + max(event.op.chunk for event in events)
    for event in events:
        if event.start >= view.seconds:
            return
        op, x, end = event.op, view.x(event.start), view.x(min(event.end, view.seconds))
        times = f"{event.start / view.unit:.4g} to {event.end / view.unit:.4g} {view.unit_name}"
        name = f"{WORDS[op.kind]} of micro-batch {op.micro_batch}{f', chunk {op.chunk}' if chunks > 1 else ''}: {times}"
        yield (f'<rect class="bar" x="{x:.2f}" y="{top + 1:.1f}" width="{end - x:.2f}" height="{view.height - 2:.1f}" '
               f'fill="{_mixed(op.kind, op.chunk, chunks)}"><title>{name}</title></rect>')  # fmt: skip
        if _has_room(view, event):
            yield f'<text class="number" x="{(x + end) / 2:.2f}" y="{top + view.height / 2:.1f}" dy=".35em">{op.micro_batch}</text>'


def _has_room(view: _View, event: Event) -> bool:
    """Whether a micro-batch's number fits in its bar."""
    return view.height >= 12 and view.x(min(event.end, view.seconds)) - view.x(event.start) >= 4 + 6.2 * len(str(event.op.micro_batch))


def _area(view: _View, top: float, line: Sequence[tuple[float, float]], peak: float) -> str:
    """Steps from one level to the next."""
    bottom, scale = top + view.height - 1, (view.height - 4) / (peak or 1.0)
    path, level = f"M{LEFT},{bottom:.1f}", 0.0
    for moment, next_level in line:
        if moment > view.seconds:
            break
        path += f"L{view.x(moment):.2f},{bottom - level * scale:.1f}L{view.x(moment):.2f},{bottom - next_level * scale:.1f}"
        level = next_level
    path += f"L{view.x(view.seconds):.2f},{bottom - level * scale:.1f}L{view.x(view.seconds):.2f},{bottom:.1f}Z"
    base = f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom:.1f}" y2="{bottom:.1f}"/>'
    return f'<path class="area" d="{path}"/>{base}'


def _draw_rows(axes: Any, view: _View, timeline: Timeline) -> None:
    """The bars on matplotlib's axes."""
    chunks = 1 + max(event.op.chunk for event in timeline.stages[0].events)
    for number, stage in enumerate(timeline.stages):
        shown = [event for event in stage.events if event.start < view.seconds]
        axes.broken_barh([(0, view.seconds / view.unit)], (number - 0.42, 0.84), facecolor="#eef1f4")
        axes.broken_barh([(event.start / view.unit, (event.end - event.start) / view.unit) for event in shown], (number - 0.42, 0.84),
                         facecolor=[_mixed(event.op.kind, event.op.chunk, chunks) for event in shown], edgecolor="white", linewidth=0.4)  # fmt: skip
        for event in shown:
            if _has_room(view, event):
                middle = (event.start + min(event.end, view.seconds)) / 2 / view.unit
                axes.text(middle, number, str(event.op.micro_batch), color="white", fontsize=6.5, ha="center", va="center")
