"""Threads are torch's: as many as ``torch.set_num_threads`` says, in whichever thread a kernel is called."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from llmkern import dispatch

pytestmark = [
    pytest.mark.skipif(dispatch.unavailable("native") is not None, reason="the native library is not built"),
    pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc"),
]

# Each call is large enough to be shared out among all threads, and comes first in a thread of its own.
PROGRAM = """
import os, threading, time
import torch
import llmkern, llmkern.functional as LF, llmkern.nn as nn, llmkern.numpy as lnp

table, indices = torch.randn(5000, 128), torch.randint(5000, (4096,))
lstm, x = nn.LSTM(128, 256), torch.randn(16, 64, 128)
one = torch.nn.Parameter(torch.randn(1 << 20))
one.grad = torch.randn(1 << 20)
adam = llmkern.optim.Adam([one])

def loss():
    logits = torch.randn(512, 4000, requires_grad=True)
    LF.cross_entropy(logits, torch.randint(4000, (512,))).backward()

def bag():
    weight = table.clone().requires_grad_()
    LF.embedding_bag(indices.view(512, 8), weight).sum().backward()

def product():
    weight = torch.randn(4000, 128, requires_grad=True)
    LF.linear_cross_entropy(torch.randn(512, 128), weight, torch.randint(4000, (512,))).backward()

CALLS = {
    "cross_entropy": loss, "embedding_bag": bag, "linear_cross_entropy": product,
    "lstm": lambda: lstm(x)[0].sum().backward(),
    "embedding": lambda: LF.embedding(indices, table),
    "mse_loss": lambda: LF.mse_loss(table, table + 1),
    "layer_norm": lambda: LF.layer_norm(table, table.shape[-1:]),
    "dropout": lambda: llmkern.ops.dropout.dropout(table, 0.5, 1, "native"),
    "adam": adam.step,
    "numpy": lambda: lnp.gemm(table.numpy().T, table.numpy()),
}

def tasks():
    # Once it no longer changes: a team goes some time after its master.
    last, now = -1, len(os.listdir("/proc/self/task"))
    while now != last:
        time.sleep(0.02)
        last, now = now, len(os.listdir("/proc/self/task"))
    return now

def started(call):
    # How many threads a call leaves behind: OpenMP's wait for the next region as long as their master lives.
    count, errors = [], []
    def run():
        before = tasks()
        try:
            with llmkern.backend("native"):
                call()
        except BaseException as error:
            errors.append(error)
        count.append(tasks() - before)
    thread = threading.Thread(target=run)
    thread.start(), thread.join()
    if errors:
        raise errors[0]
    return count[0]

torch.set_num_threads(1)
print({name: started(call) for name, call in CALLS.items()})
torch.set_num_threads(3)
print({name: started(call) for name, call in CALLS.items()})
"""


def test_a_new_thread_takes_torchs_number_of_threads() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "OMP_NUM_THREADS": "6", "OMP_WAIT_POLICY": "passive"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    one, three = map(eval, done.stdout.splitlines())
    assert set(one.values()) == {0}, one
    # Two beside the caller. A call that is worth fewer threads starts fewer, and never more.
    assert set(three.values()) <= {1, 2}, three
    assert sum(n == 2 for n in three.values()) >= 6, three
