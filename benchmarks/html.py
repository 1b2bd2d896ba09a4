"""The report page: one self-contained file of any number of result files."""

from __future__ import annotations

import io
from html import escape
from pathlib import Path
from typing import Any

from . import plots, report
from .runner import Row

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2321; --paper: #fbfaf7; --rule: #d9d6cd; --good: #0b6e4f; --bad: #a4441f; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e4dd; --paper: #171a19; --rule: #37403c; --good: #57c49a; --bad: #e58a62; }
  img { background: #fff; border-radius: 4px; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
       max-width: 1320px; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .3rem; }
.environment { font-size: .82rem; opacity: .8; white-space: pre-line; margin: 0 0 .8rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .28rem .45rem; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
th button { font: inherit; font-weight: 600; color: inherit; background: none; border: 0; padding: 0; cursor: pointer; }
th[aria-sort=ascending] button::after { content: " ▲"; } th[aria-sort=descending] button::after { content: " ▼"; }
.ahead { color: var(--good); } .behind { color: var(--bad); font-weight: 600; }
img { width: 100%; max-width: 1000px; height: auto; display: block; margin: .6rem 0; }
details { font-size: .82rem; margin-top: .5rem; }
@media (max-width: 640px) {
  th:first-child, td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 8.5rem; max-width: 8.5rem; }
}
"""

# A click on a heading sorts by the cells' data-value, numbers as numbers.
_SCRIPT = """
for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => {
  const th = button.parentElement, table = th.closest("table"), body = table.tBodies[0];
  const up = th.getAttribute("aria-sort") !== "ascending", column = th.cellIndex;
  for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
  th.setAttribute("aria-sort", up ? "ascending" : "descending");
  const key = row => { const v = row.cells[column].dataset.value; return v === "" ? NaN : isNaN(v) ? v : Number(v); };
  const rows = [...body.rows].sort((a, b) => {
    const x = key(a), y = key(b);
    if (Number.isNaN(x)) return 1;
    if (Number.isNaN(y)) return -1;
    return (x < y ? -1 : x > y ? 1 : 0) * (up ? 1 : -1);
  });
  body.append(...rows);
});
"""


def write_page(path: Path, files: list[tuple[dict[str, Any], dict[str, float], list[Row]]]) -> None:
    """Writes the page: for every result file its header, tables and figures."""
    sections = "\n".join(_section(*file) for file in files)
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>llmkern benchmarks</title><style>{_STYLE}</style></head>
<body><h1>llmkern benchmarks</h1>
<p>Ratios are a peer's time over llmkern's in the same run: above 1 llmkern is faster. "Of limit" is the least
time that the machine's measured limits allow, over llmkern's time. Click a heading to sort.</p>
{sections}<script>{_SCRIPT}</script></body></html>
"""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page)


def _section(environment: dict[str, Any], limits: dict[str, float], rows: list[Row]) -> str:
    title = f"{environment['gpu'] or environment['cpu']}, {environment['date'][:10]}"
    parts = [
        f"<h2>{escape(title)}</h2>",
        f'<p class="environment">{escape(report.environment_line(environment, limits))}</p>',
        _table([row for row in rows if row.scaling is None]),
    ]
    for name, figure in plots.figures(limits, rows).items():
        svg = io.BytesIO()
        figure.savefig(svg, format="svg")
        parts.append(_svg_image(svg.getvalue(), name))
    if missing := report.reasons(rows):
        items = "".join(f"<li>{escape(reason)}</li>" for reason in missing)
        parts.append(f"<details><summary>Not measured</summary><ul>{items}</ul></details>")
    return "\n".join(parts)


def _svg_image(svg: bytes, name: str) -> str:
    import base64

    return f'<img alt="{escape(name)}" src="data:image/svg+xml;base64,{base64.b64encode(svg).decode()}">'


def _table(rows: list[Row]) -> str:
    peers = report.peers_of(rows)
    head = "".join(f'<th><button type="button">{escape(title)}</button></th>' for title in report.header(peers))
    body = []
    for row in rows:
        texts, values, kinds = report.cells(row, peers), _values(row, peers), _kinds(row, peers)
        cells = (
            f'<td class="{kind}" data-value="{escape(str(value))}">{escape(text)}</td>'
            for text, value, kind in zip(texts, values, kinds, strict=True)
        )
        body.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _values(row: Row, peers: list[str]) -> list[Any]:
    """What each cell sorts by; empty where there is nothing."""
    ours = row.results[report.OURS]
    ratios = [row.results[p].ratio if p in row.results else None for p in peers]
    values = [row.id, ours.median, *ratios, row.share, ours.peak, ours.error]
    return ["" if value is None else value for value in values]


def _kinds(row: Row, peers: list[str]) -> list[str]:
    ratios = [row.results[p].ratio if p in row.results else None for p in peers]
    kinds = ["" if r is None else "ahead" if round(r, 2) >= 1 else "behind" for r in ratios]
    match = row.results[report.OURS].match
    return ["", "", *kinds, "", "", "behind" if match is False else ""]
