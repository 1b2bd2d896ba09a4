"""What got faster or slower between two result files, beyond noise.

Milliseconds of different runs do not compare on shared machines; ratios to a peer measured in the same run do. A case
has changed if its ratio to the common peer moved by more than the spread of both measurements.
"""

from __future__ import annotations

from dataclasses import dataclass

from .runner import OURS, Measurement, Row


@dataclass(frozen=True)
class Change:
    """``factor`` > 1: faster than before, by the same-run ratio to ``peer``; ``noise`` is what would not count."""

    id: str
    peer: str
    before: float
    after: float
    noise: float

    @property
    def factor(self) -> float:
        return self.after / self.before

    @property
    def verdict(self) -> str:
        if self.factor > 1 + self.noise:
            return "faster"
        return "slower" if self.factor < 1 / (1 + self.noise) else "same"


def _spread(m: Measurement) -> float:
    if not m.median or m.low is None or m.high is None:
        return 0.0
    return (m.high - m.low) / m.median


def compare(before: list[Row], after: list[Row], peer: str = "torch", least: float = 0.03) -> list[Change]:
    """The changes of all cases that both files have with `peer`, the worst first. Noise is at least `least`."""
    old = {row.id: row for row in before}
    changes = []
    for row in after:
        if row.id not in old or not all(peer in r.results and OURS in r.results for r in (row, old[row.id])):
            continue
        a, b = old[row.id].results, row.results
        if a[peer].ratio is None or b[peer].ratio is None:
            continue
        noise = max(least, sum(_spread(m) for m in (a[OURS], a[peer], b[OURS], b[peer])) / 2)
        changes.append(Change(row.id, peer, a[peer].ratio, b[peer].ratio, noise))
    return sorted(changes, key=lambda change: change.factor)
