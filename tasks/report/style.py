"""The page's style: one sheet for wide, narrow, dark and paper. No fonts, images or scripts from anywhere."""

STYLE = """
:root { color-scheme: light dark;
  --paper: #ffffff; --panel: #f6f7f8; --ink: #1c2329; --muted: #5b6770; --line: #dde2e6; --accent: #2b6491;
  --band: #2b649126; --good: #24744c; --warn: #8a5a00; --bad: #b02f26; --bad-panel: #fbefee; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #14181b; --panel: #1b2125; --ink: #dce2e6; --muted: #93a0a9; --line: #2d363c; --accent: #82b4da;
  --band: #82b4da30; --good: #7cc49e; --warn: #d9ab58; --bad: #ec8f86; --bad-panel: #2b1d1c; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; padding: 40px 28px 64px; max-width: 1160px; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: break-word; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px; font-weight: 600; letter-spacing: -0.01em; }
h2 { font-size: 18px; line-height: 1.3; margin: 44px 0 12px; font-weight: 600; }
h3 { font-size: 15px; margin: 24px 0 8px; font-weight: 600; }
p { margin: 0 0 12px; max-width: 76ch; }
code, pre, .key { font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.muted, small { color: var(--muted); } small { font-size: 12.5px; }
.good { color: var(--good); } .warn { color: var(--warn); } .bad { color: var(--bad); }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); gap: 14px 24px; margin: 22px 0 0;
  padding: 16px 0; border-top: 1px solid var(--line); border-bottom: 1px solid var(--line); }
.facts dt { color: var(--muted); font-size: 12.5px; } .facts dd { margin: 0; } .facts .wide { grid-column: 1 / -1; }
nav { margin: 14px 0 0; font-size: 13.5px; } nav a { display: inline-block; margin-right: 16px; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
.stopped { margin: 22px 0 0; padding: 14px 18px; background: var(--bad-panel); border-left: 3px solid var(--bad); }
.stopped pre { margin: 6px 0 0; background: none; padding: 0; max-height: none; }
.scroll { overflow-x: auto; margin: 0 0 14px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; padding: 7px 14px 7px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; } thead th { color: var(--muted); font-size: 12.5px; border-bottom-color: var(--muted); }
th:last-child, td:last-child { padding-right: 0; }
tbody th[scope=row] { min-width: 150px; } td { min-width: 56px; }
td code, td pre, dd, summary { overflow-wrap: anywhere; }
.n { text-align: right; white-space: nowrap; } .key, .tight { white-space: nowrap; }
td small, th small { display: block; font-weight: 400; }
tbody.group > tr:first-child th { padding-top: 18px; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(290px, 1fr)); gap: 14px 22px; }
.chart { margin: 0; min-width: 0; } .chart svg { display: block; width: 100%; height: auto; }
figcaption { font-size: 13px; } figcaption b { font-weight: 600; }
svg text { fill: var(--muted); font-size: 10.5px; font-family: inherit; }
.grid { stroke: var(--line); } .axis { stroke: var(--muted); } .curve { fill: none; stroke: var(--accent);
  stroke-width: 1.6; stroke-linejoin: round; } .band { fill: var(--band); } .dot { fill: var(--accent); }
.bar { fill: var(--accent); } .bar.over { fill: var(--warn); }
.tokens .t { border-left: 1px solid var(--line); } .tokens .trained { background: var(--band); }
.lineage { max-width: none; display: block; } .lineage .name { fill: var(--ink); font-size: 12px; font-weight: 600; }
.box { fill: var(--panel); stroke: var(--line); } .box.model { stroke: var(--accent); } .edge { fill: none;
  stroke: var(--muted); stroke-opacity: 0.55; }
details { border-bottom: 1px solid var(--line); } summary { cursor: pointer; padding: 8px 0; }
summary:focus-visible, a:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
details > .inside { padding: 0 0 18px 16px; } details details { border: 0; }
details.plain { border: 0; margin: 0 0 8px; }
pre { background: var(--panel); padding: 12px 14px; margin: 0 0 10px; max-height: 420px; overflow: auto;
  white-space: pre-wrap; }
footer { margin-top: 44px; color: var(--muted); font-size: 12.5px; }
@media (max-width: 620px) { body { padding: 22px 16px 48px; } h1 { font-size: 23px; }
  .facts { grid-template-columns: 1fr 1fr; gap: 12px 16px; } .charts { grid-template-columns: 1fr; }
  table { font-size: 13.5px; } th, td { padding-right: 12px; } details > .inside { padding-left: 0; } }
@media print { :root { --paper: #fff; --panel: #fff; --ink: #000; --muted: #444; --line: #bbb; --accent: #1d4f78;
  --band: #1d4f7826; --good: #14532d; --warn: #6b4500; --bad: #8c1d15; --bad-panel: #fff; }
  body { padding: 0; max-width: none; font-size: 10.5pt; } nav { display: none; } pre { max-height: none; }
  .scroll { overflow: visible; } .lineage { width: 100%; height: auto; } .chart, tr { break-inside: avoid; }
  h2, h3 { break-after: avoid; } }
"""
