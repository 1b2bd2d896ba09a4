"""What got faster or slower between two result files, beyond noise.

Milliseconds of different runs do not compare on shared machines; ratios to a peer measured in the same run do. A case
has changed if its ratio to the common peer moved by more than the spread of both measurements.
"""

from __future__ import annotations

from dataclasses import dataclass

from .result import Measurement, Row


@dataclass(frozen=True)
class Change:
    """``factor`` > 1: faster than before, by the same-run ratio to ``peer``; ``noise`` is what would not count.
    ``after`` is None where ours failed in the newer file."""

    id: str
    peer: str
    before: float
    after: float | None
    noise: float

    @property
    def factor(self) -> float:
        return self.after / self.before if self.after is not None else 0.0

    @property
    def verdict(self) -> str:
        if self.after is None:
            return "failed"
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
        if row.id not in old or peer not in row.results or peer not in old[row.id].results:
            continue
        a, b = old[row.id], row
        ratio, now = a.results[peer].ratio, b.results[peer].ratio
        failed = b.ours.reason is not None
        if ratio is None or (now is None and not failed):
            continue
        noise = max(least, sum(_spread(m) for m in (a.ours, a.results[peer], b.ours, b.results[peer])) / 2)
        changes.append(Change(row.id, peer, ratio, None if failed else now, noise))
    return sorted(changes, key=lambda change: change.factor)
