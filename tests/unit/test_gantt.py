"""The picture of a pipeline: every event is a bar in its place, idle time stays empty, text is text, and nothing is loaded or imported that is not there."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from typing import Any
from xml.etree import ElementTree

import pytest

from megatron_skywork.errors import ConfigError
from megatron_skywork.plan import gantt
from megatron_skywork.plan.simulation import PieceCost, Timeline, simulate

PIECES = [PieceCost(0.01, 0.02, 0.008, 0.001, 2.0**30)] * 4
NUMBER = r"[0-9.]+"


def timeline(schedule: str = "1f1b", pieces: list[PieceCost] = PIECES, stages: int = 4, micro_batches: int = 8) -> Timeline:
    return simulate(pieces, stages=stages, micro_batches=micro_batches, schedule=schedule, keep_events=True)


def drawn(text: str) -> ElementTree.Element:
    """The SVG as a tree, which also says that it is well formed."""
    return ElementTree.fromstring(text)


@pytest.mark.parametrize(("schedule", "stages"), [("1f1b", 4), ("zero-bubble", 4), ("interleaved", 2)])
def test_every_event_is_a_bar_in_its_place(schedule: str, stages: int) -> None:
    found = timeline(schedule, stages=stages)
    bars = [element for element in drawn(gantt.svg(found, PIECES, title="x")).iter("rect") if element.get("class") == "bar"]
    events = [(number, event) for number, stage in enumerate(found.stages) for event in stage.events]
    assert len(bars) == len(events)
    width = gantt.WIDTH - gantt.LEFT - gantt.RIGHT
    rows = sorted({float(bar.get("y", "")) for bar in bars})
    for bar, (stage, event) in zip(bars, events, strict=True):
        assert float(bar.get("x", "")) == pytest.approx(gantt.LEFT + width * event.start / found.seconds, abs=0.01)
        assert float(bar.get("width", "")) == pytest.approx(width * (event.end - event.start) / found.seconds, abs=0.02)
        assert rows.index(float(bar.get("y", ""))) == stage
    words = " ".join(gantt.WORDS[kind] for kind in {event.op.kind for _, event in events})
    assert all(word in gantt.svg(found, PIECES, title="x") for word in words.split())


def test_labels_say_what_the_simulation_says() -> None:
    pieces = [PieceCost(0.01, 0.02, kept_bytes=2.0**30)] * 3 + [PieceCost(0.02, 0.04, kept_bytes=2.0**30)]
    found = timeline(pieces=pieces)
    text = gantt.svg(found, pieces, title="x")
    assert [f"idle {stage.idle_seconds / found.seconds:.1%}" in text for stage in found.stages] == [True] * 4
    assert all(f"peak {number} GiB" in text for number in (1, 2, 3, 4))
    assert f"{found.bubble:.1%}" in text and "time (ms)" in text


def test_memory_is_drawn_to_one_scale() -> None:
    """Of 1F1B's four stages the first holds four micro-batches and the last one: its area is a quarter as high."""
    areas = [element.get("d", "") for element in drawn(gantt.svg(timeline(), PIECES, title="x")).iter("path")]
    heights = []
    for path in areas:
        levels = [float(y) for y in re.findall(rf"[ML]{NUMBER},({NUMBER})", path)]
        heights.append(max(levels) - min(levels))
    assert [height / heights[0] for height in heights] == pytest.approx([1, 0.75, 0.5, 0.25], abs=0.02)


def test_text_is_escaped_and_nothing_is_loaded() -> None:
    text = gantt.page(timeline(), PIECES, title='<script>alert("1")</script> & $x$')
    assert "<script" not in text and "&lt;script&gt;" in text
    assert not re.search(r"(src|href)=|@import|url\(", text)
    assert "prefers-color-scheme: dark" in text


def test_a_number_is_written_where_it_fits() -> None:
    few = gantt.svg(timeline(micro_batches=8), PIECES, title="x")
    many = gantt.svg(timeline(micro_batches=300), PIECES, title="x")
    assert few.count('class="number"') == 64
    assert many.count('class="number"') == 0


def test_of_a_long_step_the_beginning_is_drawn_and_said_so() -> None:
    found = timeline(micro_batches=3000)
    text = gantt.svg(found, PIECES, title="x")
    assert re.search(rf"of which the first {NUMBER} s are shown", text)
    assert gantt.MOST_EVENTS * 0.9 < text.count('class="bar"') <= gantt.MOST_EVENTS + 100


def test_a_timeline_without_events_is_refused() -> None:
    with pytest.raises(ConfigError, match="keep_events=True"):
        gantt.svg(simulate(PIECES, stages=4, micro_batches=8), PIECES, title="x")


def test_png_is_a_picture() -> None:
    pytest.importorskip("matplotlib")
    content = gantt.png(timeline("zero-bubble"), PIECES, title="$ <b>")
    assert content.startswith(b"\x89PNG") and len(content) > 10_000


def test_png_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def without(name: str, *args: Any) -> Any:
        return None if name == "matplotlib" else find(name, *args)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(ConfigError, match=re.escape("megatron_skywork[plot]")):
        gantt.png(timeline(), PIECES, title="x")


def test_the_module_imports_no_matplotlib() -> None:
    code = "import sys, megatron_skywork.plan.gantt; sys.exit('matplotlib' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
