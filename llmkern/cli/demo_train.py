"""Two implementations of one training run, taking turns.

Both start from the same parameters and see the same batches. They run in segments of a few steps, one after the
other, and who goes first changes every time: a busy machine slows both alike, and the ratio of two neighbouring
segments says what one number over the whole run could not.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .demo_data import BATCH, VOCABULARY, WINDOW, Corpus, DemoError, batches, windows
from .demo_model import build

IMPLEMENTATIONS = ("torch", "llmkern")
SEGMENT = 10
LEARNING_RATE = 1e-2


@dataclass(frozen=True)
class Settings:
    """What both implementations share."""

    device: str = "cpu"
    bf16: bool = False
    seed: int = 0

    def precision(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device, torch.bfloat16) if self.bf16 else nullcontext()


@dataclass
class Runner:
    """One implementation: its model, optimizer, and what was measured of it."""

    name: str
    settings: Settings
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        nn = importlib.import_module(f"{self.name}.nn")
        has_optim = importlib.util.find_spec(f"{self.name}.optim") is not None
        self.optim_name = f"{self.name if has_optim else 'torch'}.optim"
        optim = importlib.import_module(self.optim_name)
        self.model = build(nn, self.settings.seed).to(self.settings.device)
        self.criterion = nn.CrossEntropyLoss()
        self.optimizer = optim.Adam(self.model.parameters(), lr=LEARNING_RATE)

    def loss(self, words: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        device = self.settings.device
        with self.settings.precision():
            logits, _ = self.model(words.to(device))
            return self.criterion(logits.flatten(0, 1), targets.to(device).flatten())

    def step(self, words: torch.Tensor, targets: torch.Tensor) -> float:
        self.optimizer.zero_grad()
        loss = self.loss(words, targets)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def warm_up(self, words: torch.Tensor, targets: torch.Tensor) -> None:
        """Allocates and compiles what the first step would; the parameters stay as they are."""
        self.loss(words, targets).backward()
        self.optimizer.zero_grad()

    def segment(self, data: list[tuple[torch.Tensor, torch.Tensor]], on_step: Callable[[float], None]) -> None:
        """Trains on ``data`` and times it; ``loss.item()`` in every step has waited for the device."""
        busy = 0.0
        for words, targets in data:
            start = time.perf_counter()
            loss = self.step(words, targets)
            busy += time.perf_counter() - start
            self.losses.append(loss)
            on_step(loss)
        self.seconds.append(busy / len(data))

    @torch.no_grad()
    def perplexity(self, ids: torch.Tensor) -> float:
        """exp of the mean loss over ``ids``, cut into windows that each start from a zero state."""
        self.model.eval()
        starts = torch.arange(0, len(ids) - WINDOW, WINDOW)
        total = sum(self.loss(*windows(ids, part)).item() * len(part) for part in starts.split(BATCH))
        self.model.train()
        return math.exp(total / len(starts))

    @property
    def tokens_per_second(self) -> float:
        return BATCH * WINDOW / statistics.median(self.seconds)


def runners(settings: Settings) -> list[Runner]:
    """Both implementations.

    Raises:
        DemoError: if their parameters differ, which would make every comparison void.
    """
    both = [Runner(name, settings) for name in IMPLEMENTATIONS]
    theirs, ours = (runner.model.state_dict() for runner in both)
    different = [key for key in theirs if key not in ours or not torch.equal(theirs[key], ours[key])]
    if different or len(theirs) != len(ours):
        raise DemoError(f"the two models do not start from equal parameters: {', '.join(different)}")
    return both


def train(both: list[Runner], corpus: Corpus, steps: int, on_step: Callable[[str, float], None]) -> bool:
    """Trains both for ``steps`` steps in turns; False if Ctrl-C ended it early, what was measured stays."""
    stream = batches(corpus.train, torch.Generator().manual_seed(both[0].settings.seed))
    try:
        for index, start in enumerate(range(0, steps, SEGMENT)):
            data = [next(stream) for _ in range(min(SEGMENT, steps - start))]
            for runner in both if index % 2 == 0 else both[::-1]:
                if index == 0:
                    runner.warm_up(*data[0])
                runner.segment(data, lambda loss, name=runner.name: on_step(name, loss))  # type: ignore[misc]
    except KeyboardInterrupt:
        return False
    return True


@dataclass(frozen=True)
class Agreement:
    """How far two loss curves are apart, relative to the loss, and whether rounding explains it.

    A step's rounding errors are fed to the next one, so that the distance grows along the run: torch.nn against itself,
    started one unit in the last place away, is 1e-7 apart in the first segment and 1e-2 after 300 steps. A wrong
    gradient shows in the first segment. (bf16 has 2^16 times the rounding error.)
    """

    first: float
    largest: float
    first_bound: float
    largest_bound: float

    @property
    def holds(self) -> bool:
        return self.first <= self.first_bound and self.largest <= self.largest_bound


def differences(both: list[Runner]) -> list[float]:
    """How far the two losses of every step are apart, relative to torch's."""
    theirs, ours = (runner.losses for runner in both)
    return [abs(a - b) / abs(a) if math.isfinite(a + b) else math.inf for a, b in zip(theirs, ours, strict=False)]


def agreement(both: list[Runner]) -> Agreement:
    apart = differences(both)
    bounds = (1e-3, 1e-1) if both[0].settings.bf16 else (1e-5, 5e-2)
    return Agreement(max(apart[:SEGMENT], default=0.0), max(apart, default=0.0), *bounds)


def ratios(both: list[Runner]) -> list[float]:
    """llmkern's speed over torch's, for each pair of neighbouring segments."""
    theirs, ours = (runner.seconds for runner in both)
    return [a / b for a, b in zip(theirs, ours, strict=False)]


def peak_memory(name: str, settings: Settings) -> int | None:
    """Bytes that a few training steps need above what is there when the imports are done, in a process of its own."""
    command = [sys.executable, "-m", "llmkern", "demo-peak", name, "--device", settings.device]
    # `-m` looks into the working folder first: there this very package must be.
    home = Path(__file__).parents[2]
    command += ["--bf16"] * settings.bf16
    result = subprocess.run(command, cwd=home, capture_output=True, text=True, check=False)
    return int(json.loads(result.stdout)["bytes"]) if result.returncode == 0 else None


def measure_peak(name: str, settings: Settings) -> int:
    """What :func:`peak_memory` asks its process to do."""
    generator = torch.Generator().manual_seed(settings.seed)
    importlib.import_module(f"{name}.nn")
    before = _resident_peak()
    runner = Runner(name, settings)
    for _ in range(4):
        words = torch.randint(VOCABULARY, (BATCH, WINDOW + 1), generator=generator)
        runner.step(words[:, :-1], words[:, 1:])
    if settings.device == "cuda":
        return torch.cuda.max_memory_allocated()
    return _resident_peak() - before


def _resident_peak() -> int:
    """This process's own peak. Linux's ru_maxrss would start from that of the process that launched it."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
