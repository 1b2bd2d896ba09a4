"""What is measured, and the files that keep it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .peers import PAGES

FORMAT = 3
# What the header of a result file says; `machine.environment` collects it.
ENVIRONMENT = (
    "date", "cpu", "gpu", "cores", "threads", "isa", "cache", "memory", "hugepages", "load", "system", "python",
    "llmkern", "commit", "compiler", "torch", "triton", "peers",
)  # fmt: skip
OURS = "llmkern"
SHORT = {"forward": "fwd", "forward+backward": "fwd+bwd", "step": "step"}


@dataclass
class Measurement:
    """One implementation on one run.

    Attributes:
        median, low, high: seconds of a call: the median, and the quartiles over the rounds.
        ratio: its time over ours, the median over the rounds.
        cold, cold_ratio: the same with flushed caches, where the case fits into them.
        peak: bytes of memory above the inputs.
        error: of the results, relative to the reference; ``match`` says whether that is rounding.
        reason: why there is nothing; ``absent`` if there was nothing to measure, rather than a failure.
    """

    median: float | None = None
    low: float | None = None
    high: float | None = None
    ratio: float | None = None
    cold: float | None = None
    cold_ratio: float | None = None
    peak: int | None = None
    error: float | None = None
    match: bool | None = None
    reason: str | None = None
    absent: bool = False


@dataclass
class Row:
    """One run with all its measurements: a row of the report. ``floor`` is the least seconds the limits allow."""

    id: str
    op: str
    case: str
    dtype: str
    phase: str
    sizes: dict[str, Any]
    flops: float
    reads: float
    writes: float
    quick: bool = False
    scaling: tuple[str, str, float] | None = None
    floor: float | None = None
    bound: str | None = None
    results: dict[str, Measurement] = field(default_factory=dict)

    @property
    def bytes(self) -> float:
        return self.reads + self.writes

    @property
    def title(self) -> str:
        return f"{self.case} {self.dtype} {SHORT[self.phase]}"

    @property
    def ours(self) -> Measurement:
        return self.results.get(OURS, Measurement())

    @property
    def share(self) -> float | None:
        """Our share of the machine's limit; of the memory's, what fits into a cache says nothing while it is there."""
        seconds = self.ours.cold if self.bound == "bytes" and self.ours.cold else self.ours.median
        return self.floor / seconds if self.floor and seconds else None

    def best(self, peer: str | None = None, cold: bool = False) -> tuple[str, float] | None:
        """The fastest implementation of a peer (of all peers if None), and its time over ours."""
        ratios = {
            name: m.cold_ratio if cold else m.ratio
            for name, m in self.results.items()
            if name != OURS and peer in (None, peer_of(name))
        }
        timed = {name: ratio for name, ratio in ratios.items() if ratio is not None}
        return min(timed.items(), key=lambda item: item[1]) if timed else None

    @property
    def behind(self) -> bool:
        """Whether a peer is faster, by what two decimals show."""
        best = self.best()
        return best is not None and round(best[1], 2) < 1


def peer_of(name: str) -> str:
    """The peer that an implementation is a variant of: pages of another size make no other peer."""
    base, _, variant = name.partition("+")
    return base if variant in PAGES else name


def peers_of(rows: list[Row]) -> list[str]:
    """The peers that the rows have something of, in order."""
    found = ((name, m) for row in rows for name, m in row.results.items() if name != OURS)
    return list(dict.fromkeys(peer_of(name) for name, m in found if not m.absent))


@dataclass
class Result:
    """A result file: where it was measured, the limits found there, and the rows."""

    environment: dict[str, Any]
    limits: dict[str, float]
    rows: list[Row]


class ResultFileError(ValueError):
    """Not a result file of this suite."""


def save(path: Path, result: Result) -> None:
    """Writes a result file whole or not at all."""
    content = {"format": FORMAT, **asdict(result)}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)


def load(path: Path) -> Result:
    """Reads a result file.

    Raises:
        ResultFileError: if it cannot be read, or is not one.
    """
    try:
        content = json.loads(path.read_text())
        if content["format"] != FORMAT:
            raise ResultFileError(f"{path} has result format {content['format']}, expected {FORMAT}; measure again")
        rows = []
        for raw in content["rows"]:
            results = {name: Measurement(**m) for name, m in raw.pop("results").items()}
            rows.append(Row(**raw, results=results))
        return Result({key: content["environment"][key] for key in ENVIRONMENT}, content["limits"], rows)
    except ResultFileError:
        raise
    except OSError as error:
        raise ResultFileError(f"{path} cannot be read: {error.strerror}") from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        what = "not JSON" if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ResultFileError(f"{path} is not a result file of `llmkern bench --json` ({what})") from error
