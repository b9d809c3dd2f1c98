"""The page's CSS. It is part of the page, which loads nothing from anywhere.

Plots are drawn on white; a dark screen inverts them and turns the hues back, which keeps a line's colour and makes the paper dark.
"""

CSS = """
:root {
  --paper: #f6f7f9; --card: #ffffff; --ink: #22303c; --muted: #66727f; --rule: #e3e7ec;
  --accent: #2b6cb0; --good: #2f7d5b; --warn: #b8501f; --heat: 207, 95, 54;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #12171c; --card: #1a2128; --ink: #dfe5ea; --muted: #93a0ad; --rule: #2b343d;
    --accent: #79b0e4; --good: #6bbf98; --warn: #ea9a6c; --heat: 234, 130, 84;
  }
  figure img { filter: invert(1) hue-rotate(180deg); mix-blend-mode: screen; }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 36px 24px 64px; }
h1 { font-size: 27px; line-height: 1.2; font-weight: 650; margin: 0; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 18px; font-weight: 650; margin: 44px 0 14px; }
h3 { font-size: 15px; font-weight: 650; margin: 0 0 2px; }
p { margin: 0; }
.eyebrow { color: var(--muted); font-size: 13px; margin-bottom: 4px; }
.title { display: flex; align-items: center; gap: 12px; flex-wrap: wrap; }
.badge {
  font-size: 12.5px; padding: 2px 10px; border-radius: 99px; border: 1px solid var(--rule); background: var(--card); color: var(--muted); white-space: nowrap;
}
.facts { display: flex; flex-wrap: wrap; gap: 4px 26px; margin: 14px 0 0; padding: 0; }
.facts div { display: flex; gap: 7px; }
.facts dt { color: var(--muted); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 12px; margin-top: 26px; }
.card, .tile { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
.card { padding: 18px 20px; }
.tile { padding: 13px 16px 14px; }
.tile .label { color: var(--muted); font-size: 13px; overflow-wrap: anywhere; }
.tile .value { font-size: 22px; font-weight: 620; line-height: 1.3; letter-spacing: -.01em; font-variant-numeric: tabular-nums; white-space: nowrap; }
.tile .value small { font-size: 14px; font-weight: 450; color: var(--muted); }
.tile .more { color: var(--muted); font-size: 13px; }
.findings { list-style: none; margin: 0; padding: 14px 20px; }
.findings li { display: grid; grid-template-columns: 58px 1fr; gap: 10px; padding: 8px 0; border-top: 1px solid var(--rule); }
.findings li:first-child { border-top: 0; padding-top: 0; }
.findings li:last-child { padding-bottom: 0; }
.level { font-size: 12.5px; line-height: 1.8; color: var(--muted); }
.level::before { content: ""; display: inline-block; width: 8px; height: 8px; border-radius: 50%; margin-right: 7px; background: currentColor; }
.level.good { color: var(--good); }
.level.warn { color: var(--warn); }
.plots { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 14px; }
figure { margin: 0; padding: 15px 16px 12px; display: flex; flex-direction: column; min-width: 0; }
figure.wide { grid-column: 1 / -1; }
figure p { color: var(--muted); font-size: 13.5px; margin-bottom: 10px; }
figure .scroll { margin-top: auto; overflow-x: auto; }
figure img { display: block; width: 100%; height: auto; }
figure.wide img { max-width: 900px; margin: 0 auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px; }
th { font-weight: 550; color: var(--muted); font-size: 13px; text-align: right; padding: 5px 10px; border-bottom: 1px solid var(--rule); white-space: nowrap; }
td { text-align: right; padding: 4px 10px; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
tbody tr:nth-child(5n):not(:last-child) td { border-bottom: 1px solid var(--rule); }
td.heat { background: rgba(var(--heat), var(--amount)); }
table.stages td, table.stages th { border: 0 !important; }
table.stages td:last-child { width: 60%; }
.bar { display: block; height: 9px; border-radius: 3px; background: var(--accent); min-width: 2px; opacity: .8; }
dl.pairs { display: grid; grid-template-columns: max-content 1fr; gap: 4px 18px; margin: 0; }
dl.pairs dt { color: var(--muted); }
dl.pairs dd { margin: 0; overflow-wrap: anywhere; }
blockquote {
  margin: 14px 0 0; padding: 10px 14px; border-left: 3px solid var(--accent); background: var(--paper); border-radius: 0 6px 6px 0;
  white-space: pre-wrap; overflow-wrap: anywhere;
}
blockquote b { font-weight: 550; color: var(--muted); }
#summary { margin-top: 26px; }
.facts + .findings, .findings + .plots { margin-top: 18px; }
.caption { color: var(--muted); font-size: 13px; margin: 16px 0 -8px; }
.split { display: grid; grid-template-columns: minmax(0, 5fr) minmax(0, 6fr); gap: 28px; }
details { margin-top: 14px; }
details.card + details.card { margin-top: 6px; }
summary .caption { font-weight: 400; margin: 0 0 0 10px; }
summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; margin: 12px 0 0; }
.key { display: inline-block; width: 22px; height: 0; border-top: 3px solid; margin-right: 8px; vertical-align: middle; }
.keys { display: flex; flex-wrap: wrap; gap: 3px 20px; margin: 0 0 12px; font-size: 13.5px; }
td.best { font-weight: 650; background: rgba(47, 125, 91, .14); }
td.tie { background: rgba(47, 125, 91, .06); }
td small { color: var(--muted); font-weight: 400; font-size: 11.5px; display: block; line-height: 1.2; }
table.compare th, table.compare td { padding: 4px 5px; font-size: 12.5px; }
table.compare th { white-space: normal; vertical-align: bottom; }
table.compare td small { font-size: 10.5px; }
table.settings td { white-space: normal; overflow-wrap: anywhere; text-align: left; vertical-align: top; max-width: 380px; }
table.settings th { text-align: left; white-space: normal; vertical-align: bottom; min-width: 70px; }
table.settings td:first-child { white-space: nowrap; }
figcaption { color: var(--muted); font-size: 13px; line-height: 1.4; margin-top: 8px; }
.after { margin-top: 18px; }
footer { color: var(--muted); font-size: 13px; margin-top: 40px; }
@media (max-width: 760px) {
  main { padding: 22px 14px 40px; }
  .plots, .split { grid-template-columns: minmax(0, 1fr); }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 10px; }
  .tile { padding: 11px 12px; }
  .tile .value { font-size: 18px; white-space: normal; }
  figure { padding: 13px 12px 10px; }
  figure.wide img { min-width: 620px; }
  .card { padding: 14px; }
  dl.pairs { grid-template-columns: minmax(0, 1fr); gap: 0; }
  dl.pairs dd { margin-bottom: 8px; }
}
@media print { body { background: #fff; } .card, .tile { break-inside: avoid; } }
"""
