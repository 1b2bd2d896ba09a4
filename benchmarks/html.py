"""The report page: one self-contained file of any number of result files."""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path

from . import plots, report
from .result import Result, Row, peer_of, peers_of

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2321; --paper: #fbfaf7; --rule: #d9d6cd; --good: #0b6e4f; --bad: #a4441f; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e4dd; --paper: #171a19; --rule: #37403c; --good: #57c49a; --bad: #e58a62; }
}
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
       max-width: 1560px; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.2rem; margin: 2.4rem 0 .3rem; }
p { max-width: 60rem; }
.environment { font-size: .82rem; opacity: .8; white-space: pre-line; overflow-wrap: anywhere; margin: 0 0 .8rem; }
.tools { display: flex; flex-wrap: wrap; gap: .4rem 1.2rem; align-items: center; font-size: .85rem; margin: .6rem 0; }
.tools input[type=search] { font: inherit; padding: .2rem .4rem; width: min(20rem, 100%); }
.scroll { overflow: auto; max-height: 85vh; border: 1px solid var(--rule); border-radius: 4px; }
table { border-collapse: separate; border-spacing: 0; font-size: .82rem; font-variant-numeric: tabular-nums;
        width: 100%; }
th, td { padding: .28rem .5rem; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th { position: sticky; top: 0; background: var(--paper); z-index: 1; white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
th:first-child { z-index: 2; }
th button { font: inherit; font-weight: 600; color: inherit; background: none; border: 0; padding: 0; cursor: pointer; }
th[aria-sort=ascending] button::after { content: " ▲"; } th[aria-sort=descending] button::after { content: " ▼"; }
.ahead { color: var(--good); } .behind { color: var(--bad); font-weight: 600; }
tr.lost td:first-child { box-shadow: inset 3px 0 var(--bad); }
.figures { columns: 30rem; column-gap: 1rem; margin: 1rem 0; }
.figures img { width: 100%; height: auto; display: block; break-inside: avoid; margin-bottom: 1rem; background: #fff;
               border: 1px solid var(--rule); border-radius: 4px; }
details { font-size: .82rem; margin-top: .5rem; overflow-wrap: anywhere; }
@media (max-width: 640px) {
  th:first-child, td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 10rem; max-width: 10rem; }
}
"""

# A click on a heading sorts by the cells' data-value, numbers as numbers, empty ones last.
_SCRIPT = """
for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => {
  const th = button.parentElement, table = th.closest("table"), body = table.tBodies[0];
  const up = th.getAttribute("aria-sort") !== "ascending", column = th.cellIndex;
  for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
  th.setAttribute("aria-sort", up ? "ascending" : "descending");
  const key = row => { const v = row.cells[column].dataset.value; return v === "" || isNaN(v) ? v : Number(v); };
  body.append(...[...body.rows].sort((a, b) => {
    const x = key(a), y = key(b);
    if (x === "" || y === "") return (x === "") - (y === "");
    return (x < y ? -1 : x > y ? 1 : 0) * (up ? 1 : -1);
  }));
});
for (const section of document.querySelectorAll("section")) {
  const words = section.querySelector("input[type=search]"), lost = section.querySelector("input[type=checkbox]");
  const filter = () => { for (const row of section.querySelectorAll("tbody tr")) {
    const text = row.cells[0].textContent, ahead = !row.classList.contains("lost");
    row.hidden = !words.value.split(" ").every(word => text.includes(word)) || lost.checked && ahead;
  } };
  words.addEventListener("input", filter);
  lost.addEventListener("change", filter);
}
"""


def write_page(path: Path, results: list[Result]) -> None:
    """Writes the page: for every result file its header, table and figures."""
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>llmkern benchmarks</title><style>{_STYLE}</style></head>
<body><h1>llmkern benchmarks</h1>
<p>{escape(report.LEGEND)} A click on a heading sorts.</p>
{"".join(map(_section, results))}<script>{_SCRIPT}</script></body></html>
"""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page)


def _section(result: Result) -> str:
    e = result.environment
    parts = [
        f"<section><h2>{escape(e['gpu'] or e['cpu'])}, {escape(e['date'][:10])}</h2>",
        f'<p class="environment">{escape(report.environment_text(result))}</p>',
        '<div class="tools"><input type="search" placeholder="filter: lstm bf16" aria-label="Filter the cases">'
        '<label><input type="checkbox"> only where a peer is faster</label></div>',
        _table(result.rows),
        '<div class="figures">',
        *(_image(name, figure) for name, figure in plots.figures(result).items()),
        "</div>",
    ]
    if missing := report.reasons(result.rows):
        items = "".join(f"<li>{escape(reason)}</li>" for reason in missing)
        parts.append(f"<details><summary>What was not measured, and why</summary><ul>{items}</ul></details>")
    return "\n".join([*parts, "</section>"])


def _image(name: str, figure: plots.Figure) -> str:
    import matplotlib

    file = io.BytesIO()
    # Text as text: a tenth of the bytes, and it can be read by whoever cannot see it.
    with matplotlib.rc_context({"svg.fonttype": "none", "font.sans-serif": ["system-ui", "DejaVu Sans", "Arial"]}):
        figure.savefig(file, format="svg")
    return f'<img alt="{escape(name)}" src="data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}">'


def _table(rows: list[Row]) -> str:
    peers = peers_of(rows)
    head = "".join(f'<th><button type="button">{escape(title)}</button></th>' for title in report.header(peers))
    body = []
    for row in rows:
        texts, values = report.cells(row, peers), report.as_row_values(row, peers)
        cells = (
            f'<td class="{kind}" title="{escape(title)}" data-value="{escape(str("" if value is None else value))}">'
            f"{escape(text).replace('/', '/<wbr>')}</td>"
            for text, value, kind, title in zip(texts, values, _kinds(row, peers), _titles(row, peers), strict=True)
        )
        body.append(f"<tr{' class=lost' if row.behind else ''}>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _kinds(row: Row, peers: list[str]) -> list[str]:
    ratios = [best[1] if (best := row.best(peer)) else None for peer in peers]
    kinds = ["" if r is None else "ahead" if round(r, 2) >= 1 else "behind" for r in ratios]
    return ["", "", *kinds, "", "", "", "behind" if row.ours.match is False else ""]


def _titles(row: Row, peers: list[str]) -> list[str]:
    """What a pointer over a cell shows: for a peer, every variant of it."""
    variants = []
    for peer in peers:
        of_peer = [(name, m) for name, m in row.results.items() if peer_of(name) == peer]
        variants.append("; ".join(f"{name}: {m.reason or report.time_text(m.median)}" for name, m in of_peer))
    return ["", "", *variants, "", "", "", ""]
