"""The report as one HTML page that needs nothing but a browser: plots are inside it, and a content policy forbids it to load anything.

Every text that comes from a run (names, settings, generated sentences) is escaped where it enters the page.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from megatron_skywork.metrics import wording
from megatron_skywork.report.finding import Finding
from megatron_skywork.report.key_figures import KeyFigures
from megatron_skywork.report.load import Run
from megatron_skywork.report.stylesheet import CSS

if TYPE_CHECKING:
    from megatron_skywork.report.style import Plot

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_LEVELS = {"good": "good", "note": "note", "warn": "watch"}


def document(title: str, body: str) -> str:
    """A whole page around its body, which is trusted HTML; the title is text."""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
    head += f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><title>{escape(title)}</title><style>{CSS}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body><main>\n{body}\n</main></body></html>\n'


def pairs(items: Mapping[str, Any] | Sequence[tuple[str, Any]], kind: str = "pairs") -> str:
    """Names and values as a definition list; values are text."""
    known = [(name, value) for name, value in (items.items() if isinstance(items, Mapping) else items) if value is not None]
    if kind == "facts":
        return '<dl class="facts">' + "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>" for name, value in known) + "</dl>"
    return '<dl class="pairs">' + "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in known) + "</dl>"


def header(run: Run) -> str:
    """Name, state, and what was run where."""
    status = run.status.get("status") or run.status.get("state")
    badge = f'<span class="badge">{escape(str(status))}</span>' if status else ""
    return f'<p class="eyebrow">Run report</p><div class="title"><h1>{escape(run.name)}</h1>{badge}</div>' + pairs(facts(run), "facts")


def facts(run: Run) -> list[tuple[str, str | None]]:
    """The run's shape in words."""
    parameters = run.header.get("parameters") or {}
    total, active = parameters.get("total"), parameters.get("active")
    model = f"{wording.count(total)} parameters" if total else None
    if model and active and active != total:
        model += f", {wording.count(active)} active"
    planned = run.setting("train.steps")
    steps = f"{int(run.steps_S[-1]):,}" + (f" of {planned:,}" if isinstance(planned, int) and planned != int(run.steps_S[-1]) else "")
    tokens = run.series("tokens")[-1]
    world_size = run.header.get("world_size")
    device = run.header.get("device")
    return [
        ("Model", model),
        ("Experts", _experts(run)),
        ("Layout", _layout(run)),
        ("Device", f"{world_size} × {device}" if world_size and device else device),
        ("Steps", steps),
        ("Tokens", wording.count(float(tokens)) if math.isfinite(tokens) else None),
    ]


def _experts(run: Run) -> str | None:
    number, topk = run.setting("moe.num_experts"), run.setting("moe.topk")
    if number is None:
        return f"{run.router.num_experts} in {len(run.router.layers)} layers" if run.router else None
    return f"{number} per layer" + (f", top-{topk}" if topk else "") + (f", {len(run.router.layers)} layers" if run.router else "")


def _layout(run: Run) -> str | None:
    degrees = {name: run.setting(f"parallel.{name}") for name in ("pp", "tp", "cp", "ep", "etp")}
    if not all(isinstance(degree, int) for degree in degrees.values()):
        return None
    shown = [f"{name.upper()} {degree}" for name, degree in degrees.items() if degree != 1]
    world_size = run.header.get("world_size")
    others = degrees["pp"] * degrees["tp"] * degrees["cp"]
    if isinstance(world_size, int) and world_size % others == 0:
        shown.append(f"DP {world_size // others}")
    return " · ".join(shown) or "one rank"


def tiles(figures: KeyFigures, window: int) -> str:
    """The run's key figures."""
    shown: list[tuple[str, str, str]] = []
    if figures.last_loss is not None and figures.first_loss is not None:
        which = f"mean of the first and last {window} records" if window > 1 else "first and last record" if figures.steps > 1 else ""
        shown.append(("Training loss", _from_to(figures.first_loss, figures.last_loss), which))
    for name, (first, last) in list(figures.validation.items())[:2]:
        shown.append(
            (f"Held-out loss, {name}", _from_to(first, last), f"{last - first:+.3f}".replace("-", "−") if first != last else "one evaluation, or no change")
        )
    if figures.tokens_per_second is not None:
        more = [f"{figures.tflops_per_device:.3g} TFLOP/s per device" if figures.tflops_per_device is not None else ""]
        more += [f"MFU {wording.percent(figures.mfu)}" if figures.mfu is not None else ""]
        more += [f"{wording.percent(figures.data_wait_share)} waiting for data" if figures.data_wait_share is not None else ""]
        shown.append(("Speed", f"{figures.tokens_per_second:,.0f} <small>tokens/s</small>", " · ".join(part for part in more if part)))
    if figures.drop_rate is not None:
        shown.append(("Dropped", wording.percent(figures.drop_rate), "of assignments, mean over layers at the end"))
    if figures.dead_experts is not None:
        balance = f"busiest: {figures.max_over_mean:.2f} × the even share" if figures.max_over_mean is not None else ""
        shown.append(("Dead experts", f"{figures.dead_experts} <small>of {figures.num_experts:,}</small>", balance))
    tile = '<div class="tile"><div class="label">{}</div><div class="value">{}</div><div class="more">{}</div></div>'
    return '<div class="tiles">' + "".join(tile.format(escape(label), value, escape(more)) for label, value, more in shown) + "</div>"


def _from_to(first: float, last: float) -> str:
    return f"<small>{first:.3f} →</small> {last:.3f}" if first != last else f"{last:.3f}"


def finding_list(found: Sequence[Finding]) -> str:
    """Findings with a coloured mark and a word, for those who do not see colours."""
    items = "".join(f'<li><span class="level {each.level}">{_LEVELS[each.level]}</span><span>{_unbroken(each.text)}</span></li>' for each in found)
    return f'<ul class="findings card">{items}</ul>'


def _unbroken(text: str) -> str:
    """Escaped, and a number and its percent sign stay on one line."""
    return escape(text.replace(" %", "\u00a0%"))


def plot_grid(plots: Sequence[Plot]) -> str:
    """Plots in two columns, wide ones across both; one column on a phone."""
    return '<div class="plots">' + "".join(_figure(plot) for plot in plots) + "</div>"


def _figure(plot: Plot) -> str:
    image = base64.b64encode(plot.png).decode("ascii")
    words = f"<h3>{escape(plot.title)}</h3><p>{escape(plot.how_to_read)}</p>"
    described = f"{plot.title}. {plot.shows}" if plot.shows else plot.title
    picture = f'<div class="scroll"><img alt="{escape(described)}" src="data:image/png;base64,{image}"></div>'
    numbers = f"<figcaption>{_unbroken(plot.shows)}</figcaption>" if plot.shows else ""
    return f'<figure class="card{" wide" if plot.wide else ""}" id="{escape(plot.key)}">{words}{picture}{numbers}</figure>'


def config_details(run: Run) -> str:
    """The resolved configuration, folded."""
    return f'<details class="card"><summary>Configuration</summary><pre>{escape(run.config_text.rstrip())}</pre></details>' if run.config_text.strip() else ""
