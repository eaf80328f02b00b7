"""The page's style sheet: light and dark by the reader's own setting, one column on a telephone, two or three on a desk."""

CSS = """
:root { color-scheme: light dark; --page: #f7f6f3; --card: #ffffff; --ink: #1d2330; --soft: #5b6474; --rule: #dedbd3;
  --grid: #e9e6df; --mark: #fff0c2; --good: #14765f; --bad: #a6404b; --on-bar: #ffffff;
  --c0: #2563b8; --c1: #c95f14; --c2: #17826c; --c3: #7d4cb2; --c4: #b13f4e; --c5: #6b7280; }
@media (prefers-color-scheme: dark) { :root { --page: #14171d; --card: #1c2129; --ink: #e6e8ec; --soft: #9aa4b2;
  --rule: #323945; --grid: #2a303a; --mark: #55481b; --good: #5fd0b1; --bad: #f0949f; --on-bar: #10131a;
  --c0: #6ea8f2; --c1: #f0a062; --c2: #5cc9ae; --c3: #bb98e8; --c4: #ef8f9b; --c5: #9aa4b2; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; }
main, header, nav { max-width: 1180px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 36px; }
.kicker { margin: 0; color: var(--soft); font-size: 13px; letter-spacing: .08em; text-transform: uppercase; }
h1 { margin: 2px 0 6px; font-size: clamp(24px, 4vw, 34px); line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 0 0 4px; font-size: 22px; line-height: 1.3; }
h3 { margin: 0 0 6px; font-size: 15px; line-height: 1.35; }
.lede { margin: 0 0 14px; color: var(--soft); max-width: 75ch; overflow-wrap: anywhere; }
nav ul { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 14px 0 0; padding: 10px 0; list-style: none;
  border-block: 1px solid var(--rule); font-size: 14px; }
a { color: var(--c0); text-decoration: none; } a:hover { text-decoration: underline; }
section { margin: 34px 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 18px 0 0; }
.tiles > div { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 12px 14px; }
.tiles dt { color: var(--soft); font-size: 13px; line-height: 1.35; }
.tiles dd { margin: 0; font-size: 23px; font-weight: 650; font-variant-numeric: tabular-nums; }
.tiles dd small { display: block; color: var(--soft); font-size: 12.5px; font-weight: 400; line-height: 1.35; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: 14px; margin: 14px 0; }
.grid > .table { margin: 0; }
@media (min-width: 760px) { .grid > .table { grid-column: span 2; } }
figure, .card { min-width: 0; margin: 0; background: var(--card); border: 1px solid var(--rule); border-radius: 10px;
  padding: 14px 16px; }
figure { display: flex; flex-direction: column; max-width: 620px; width: 100%; }
figcaption { padding-top: 8px; color: var(--soft); font-size: 13.5px; line-height: 1.45; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { fill: var(--soft); font: 11px system-ui, "Segoe UI", Roboto, sans-serif; font-variant-numeric: tabular-nums; }
svg text.on-bar { fill: var(--on-bar); font-weight: 600; }
svg .grid { stroke: var(--grid); stroke-width: 1; } svg .axis { stroke: var(--soft); }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; } .unseen { fill: transparent; }
.empty-bar { fill: var(--grid); }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; margin: 0 0 6px; padding: 0; list-style: none; font-size: 13px;
  color: var(--soft); }
.swatch { display: inline-block; width: 11px; height: 11px; margin-right: 5px; border-radius: 3px; }
.table { min-width: 0; background: var(--card); border: 1px solid var(--rule); border-radius: 10px; margin: 14px 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
.caption { margin: 0; padding: 10px 14px 6px; color: var(--soft); font-size: 13.5px; line-height: 1.45; }
th, td { padding: 6px 14px; text-align: right; white-space: nowrap; border-top: 1px solid var(--rule); }
th { color: var(--soft); font-weight: 600; } .words { text-align: left; }
.empty, .note { color: var(--soft); font-size: 14px; }
.note { border-left: 3px solid var(--c1); padding-left: 12px; }
.examples { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 14px; }
.example .where { margin: 0 0 6px; color: var(--soft); font-size: 13px; overflow-wrap: anywhere; }
.example .hits { margin: 10px 0 0; padding: 0; list-style: none; }
.example .hits li { padding: 8px 0 0; margin-top: 8px; border-top: 1px solid var(--rule); }
.hit-facts { display: flex; flex-wrap: wrap; align-items: center; gap: 2px 12px; color: var(--soft); font-size: 13px; }
.example > .hit-facts { margin-top: 6px; }
.meter { display: inline-block; width: 64px; height: 7px; border-radius: 4px; background: var(--grid); overflow: hidden; }
.meter span { display: block; height: 100%; background: var(--c0); }
pre { margin: 4px 0 0; font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; white-space: break-spaces;
  overflow-wrap: anywhere; }
mark { background: var(--mark); color: inherit; border-radius: 3px; padding: 1px 2px; }
.right { color: var(--good); font-weight: 600; } .wrong { color: var(--bad); }
details summary { cursor: pointer; color: var(--c0); }
footer { max-width: 1180px; margin: 0 auto; padding: 8px 20px 40px; color: var(--soft); font-size: 13px; }
@media (max-width: 480px) { main, header, nav, footer { padding-left: 12px; padding-right: 12px; }
  figure, .card { padding: 12px; } .tiles dd { font-size: 20px; }
  .tiles { grid-template-columns: repeat(auto-fit, minmax(136px, 1fr)); gap: 8px; } }
@media print { body { background: #fff; } figure, .card, .table { break-inside: avoid; } }
""" + "".join(f".fill{n} {{ fill: var(--c{n}); background: var(--c{n}); }} .stroke{n} {{ stroke: var(--c{n}); }}\n"
              for n in range(6))
