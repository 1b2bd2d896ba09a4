"""Tables with row gradients in other threads and processes, and under torch's wrappers."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.fsdp
from row_tables import Pair, V, batches, embedding, train

from llmkern import optim

ALL = torch.arange(V)


def test_threads_that_read_and_look_up_change_nothing() -> None:
    pair, stop, errors = Pair(), threading.Event(), []

    def read() -> None:
        try:
            while not stop.is_set():
                pair.rows.weight.norm()
                pair.rows(ALL)
                pair.optimizers[0].state_dict()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        train(pair.rows, pair.optimizers[0], batches(30, seed=6))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    train(pair.dense, pair.optimizers[1], batches(30, seed=6))
    assert not errors
    assert pair.agree()


def test_a_process_that_shares_the_memory_trains_it() -> None:
    pair = Pair()
    pair.rows.zero_grad()
    pair.rows.share_memory()
    if (child := os.fork()) == 0:
        torch.set_num_threads(1)
        train(pair.rows, pair.optimizers[0], batches(3))
        os._exit(0 if pair.rows.weight.table.count == 0 else 1)
    assert os.waitpid(child, 0)[1] == 0
    train(pair.dense, pair.optimizers[1], batches(3))
    assert torch.equal(pair.rows.weight, pair.dense.weight)


def _parallel(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store{world}", rank=rank, world_size=world)
    rows, dense, prepared = embedding(rows="replay"), embedding(), embedding()
    optim.prepare(prepared, replay=True)
    results = []
    for m in (rows, prepared, dense):
        model = torch.nn.parallel.DistributedDataParallel(m)
        optimizer = optim.AdamW(model.parameters(), lr=0.1)
        for i in range(4):
            optimizer.zero_grad()
            (model(batches(1, seed=10 * i + rank)[0][0]) ** 2).sum().backward()
            optimizer.step()
        assert m is dense or m.weight.table.count == 4
        results.append(m.weight.detach())
    for got in results[:2]:
        torch.testing.assert_close(got, results[2], rtol=1e-5, atol=1e-6)
    torch.distributed.destroy_process_group()


def _sharded(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store{world}", rank=rank, world_size=world)
    results = []
    for m in (embedding(rows="replay"), embedding()):
        model = torch.distributed.fsdp.fully_shard(torch.nn.Sequential(m))
        optimizer = optim.AdamW(model.parameters(), lr=0.1)
        for i in range(3):
            optimizer.zero_grad()
            (model(batches(1, seed=10 * i + rank)[0][0]) ** 2).sum().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        results.append(m.weight.full_tensor().detach())
    assert torch.equal(*results)
    prepared = torch.nn.Sequential(embedding())
    optim.prepare(prepared)
    model = torch.distributed.fsdp.fully_shard(prepared)
    with pytest.raises(NotImplementedError, match="Sparse"):
        model(ALL).sum().backward()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("run", [_parallel, _sharded], ids=["DistributedDataParallel", "fully_shard"])
@pytest.mark.parametrize("world", [1, 2])
def test_tables_in_several_processes(run: Callable[[int, int, str], None], world: int, tmp_path: Path) -> None:
    if (child := os.fork()) == 0:
        ranks = [os.fork() for _ in range(world - 1)]
        rank = 1 if 0 in ranks else 0
        try:
            run(rank, world, str(tmp_path))
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(1)
        os._exit(sum(os.waitpid(other, 0)[1] != 0 for other in ranks if other) if rank == 0 else 0)
    assert os.waitpid(child, 0)[1] == 0
