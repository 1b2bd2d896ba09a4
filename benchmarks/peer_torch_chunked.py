"""torch's ``linear_cross_entropy`` with its chunking options (torch 2.13): the fastest of a few settings per case."""

from __future__ import annotations

import functools
import time
from typing import Any

import torch
import torch.nn.functional as F

from .peers import AbsentError, TorchShaped
from .suite import Call, Run

CHUNKS: tuple[dict[str, Any], ...] = (
    {},
    {"chunking_method": "aspect_ratio"},
    {"batch_chunk_size": 256},
    {"batch_chunk_size": 1024},
)


class Peer(TorchShaped):
    def __init__(self) -> None:
        super().__init__("torch")

    def setup(self, run: Run, device: str) -> Call:
        options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
        if options is None:
            raise AbsentError(f"torch {torch.__version__} has no LinearCrossEntropyOptions; 2.13 has")
        best: tuple[float, Call] | None = None
        for settings in CHUNKS:
            chunked = functools.partial(F.linear_cross_entropy, options=options(**settings))
            call = TorchShaped("torch", linear_cross_entropy=chunked).setup(run, device)
            seconds = min(self._seconds(call) for _ in range(2))
            if best is None or seconds < best[0]:
                best = seconds, call
        assert best is not None
        return best[1]

    def _seconds(self, call: Call) -> float:
        begin = time.perf_counter()
        self.wait(call())
        return time.perf_counter() - begin
