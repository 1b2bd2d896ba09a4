"""The bytes that the Triton kernels of a call read and write, against those that have to be.

The interpreter makes every load and store of every program of the grid; here each active lane of each is counted. Reads
that a GPU's caches would serve count too. What torch does between kernels (a sort, a product) is not counted.
`TRITON_INTERPRET=1 python tests/kernel_traffic.py [--json]`
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from kernel_cases import every_case
from triton.runtime.interpreter import InterpreterBuilder


@contextmanager
def counting() -> Iterator[list[int]]:
    """[bytes read, bytes written] by kernels inside the block."""
    counts = [0, 0]
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def lanes(mask: Any, pointers: Any) -> int:
        return int(mask.data.sum()) * max(pointers.get_element_ty().primitive_bitwidth // 8, 1)

    def counted_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        counts[0] += lanes(mask, ptrs)
        return load(self, ptrs, mask, *rest)

    def counted_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        counts[1] += lanes(mask, ptrs)
        return store(self, ptrs, value, mask, *rest)

    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = counted_load, counted_store
    try:
        yield counts
    finally:
        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = load, store


def measure_all() -> dict[str, dict[str, float]]:
    """Of every case that says what its floor is."""
    table = {}
    for name, case in every_case().items():
        if case.small is None or case.floor is None:
            continue
        torch.manual_seed(0)
        with counting() as (counts):
            case.run(torch.device("cpu"), **case.small)
        floor = case.floor(**case.small)
        table[name] = {
            "read": counts[0],
            "written": counts[1],
            "floor": floor,
            "ratio": sum(counts) / floor,
            "allowed": case.allowed,
        }
    return table


if __name__ == "__main__":
    measured = measure_all()
    if "--json" in sys.argv:
        print(json.dumps(measured))
    else:
        print("| case | bytes read | bytes written | of the floor |\n|---|---|---|---|")
        for name, row in measured.items():
            print(f"| {name} | {row['read']:,} | {row['written']:,} | {row['ratio']:.2f} |")
