"""Memory that the native kernels keep: used again, never twice at a time, given back when asked."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import llmkern
import llmkern.functional as LF
from llmkern import dispatch

pytestmark = pytest.mark.skipif(dispatch.unavailable("native") is not None, reason="the native library is not built")
KEPT = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)


def lookup(rows: int, fill: float = 1.0) -> torch.Tensor:
    """A result of ``rows`` KiB."""
    with llmkern.backend("native"):
        return LF.embedding(torch.zeros(rows, dtype=torch.long), torch.full((1, 256), fill))


@pytest.mark.skipif(not KEPT, reason="torch 2.10 takes no memory of ours")
def test_a_freed_result_is_used_again() -> None:
    llmkern.empty_cache()
    first = lookup(20480)
    place = first.data_ptr()
    # A view keeps it alive.
    view = first[5:]
    del first
    assert lookup(20480).data_ptr() != place
    assert bool((view == 1).all())
    llmkern.empty_cache()
    del view
    again = lookup(20000)
    assert again.data_ptr() == place
    # One that would waste more than a quarter is not taken.
    del again
    assert lookup(10240).data_ptr() != place


def test_small_results_are_torchs() -> None:
    small = lookup(4)
    small.resize_(2, 256)
    assert small.shape == (2, 256)


def test_results_that_live_together_do_not_share() -> None:
    results = [lookup(n, float(n)) for n in (1023, 1024, 1025, 2048, 2049, 3000, 1024)]
    for result in results:
        assert bool((result == len(result)).all())
    places = sorted((r.data_ptr(), r.data_ptr() + r.numel() * 4) for r in results)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(places))


def test_threads_take_and_give_at_once() -> None:
    start = threading.Barrier(4)

    def work(seed: int) -> bool:
        start.wait()
        right = True
        for i in range(30):
            value = float(seed * 100 + i)
            # The force is process-wide: the kernel is called as dispatch would.
            result = torch.ops.llmkern_cpu.embedding_forward(torch.full((1, 256), value), torch.zeros(1500).long())
            right = right and bool((result == value).all())
        return right

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def resident(program: str, **environment: str) -> int:
    """MiB that the process of `program` still holds after it freed a 512 MiB result."""
    program = (
        "import torch, llmkern.functional\nfrom llmkern import native\n"
        "def held(): return int(next(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmRSS'))) >> 10\n"
        "f = torch.ops.llmkern_cpu.embedding_forward\n"
        "f(torch.ones(1, 256), torch.zeros(4).long()); before = held()\n"
        f"y = f(torch.ones(1, 256), torch.zeros(512 << 10).long()); del y\n{program}\nprint(held() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(not KEPT or sys.platform != "linux", reason="needs /proc, and torch 2.11")
def test_the_limit_and_giving_back() -> None:
    assert resident("", LLMKERN_CACHE_MB="1024") > 400
    assert resident("llmkern.empty_cache()", LLMKERN_CACHE_MB="1024") < 100
    assert resident("", LLMKERN_CACHE_MB="0") < 100
    assert resident("", LLMKERN_CACHE_MB="256") < 100


@pytest.mark.skipif(not KEPT, reason="torch 2.10 takes no memory of ours")
def test_a_result_behaves_like_any_tensor() -> None:
    result = lookup(2048).requires_grad_()
    (result * 2).sum().backward()
    assert bool((result.grad == 2).all())
    assert bool((torch.from_numpy(result.detach().numpy()) == 1).all())
    copy = result.detach().clone()
    copy.resize_(3, 256)
    assert torch.equal(result.detach().share_memory_(), torch.ones(2048, 256))
    with pytest.raises(RuntimeError, match="resize"):
        lookup(2048).resize_(4096, 256)


class _Made(torch.utils._python_dispatch.TorchDispatchMode):
    """Names of the ops that gave a tensor of at least so many elements."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.names = numel, []  # type: ignore[var-annotated]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.numel() >= self.numel:
                self.names.append(str(function))
        return result


def test_the_backward_of_a_loss_makes_nothing_as_large_as_the_logits() -> None:
    """The forward made the gradient; autograd's zeros for outputs without one would cost more than the kernel."""
    logits = torch.randn(64, 500, requires_grad=True)
    with llmkern.backend("native"):
        loss = LF.cross_entropy(logits, torch.randint(500, (64,)))
    with _Made(logits.numel()) as made:
        loss.backward()
    assert [name for name in made.names if "detach" not in name and "view" not in name] == []


def test_the_backward_of_an_lstm_makes_no_zeros_for_its_gates() -> None:
    T, B, I, H = 5, 4, 3, 64
    lstm = llmkern.nn.LSTM(I, H)
    with llmkern.backend("native"):
        y, _ = lstm(torch.randn(T, B, I))
    with _Made(T * B * 4 * H) as made:
        y.sum().backward()
    assert [name for name in made.names if "zero" in name] == []


@pytest.mark.parametrize("value", ["abc", "-1", "1.5", "12MB", " ", "0x10", "99999999999999999999"])
def test_a_limit_that_is_no_number_is_an_error(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMKERN_CACHE_MB", value)
    with pytest.raises(
        ValueError, match=f"LLMKERN_CACHE_MB={value}; expected a whole number of MiB, such as 512, or 0"
    ):
        torch.ops.llmkern_cpu.check_settings()
    for good in ("", "0", "512", "00512"):
        monkeypatch.setenv("LLMKERN_CACHE_MB", good)
        torch.ops.llmkern_cpu.check_settings()
    monkeypatch.setenv("LLMKERN_POISON", "yes")
    with pytest.raises(ValueError, match="LLMKERN_POISON=yes; expected 0 or 1"):
        torch.ops.llmkern_cpu.check_settings()


def test_a_wrong_setting_is_an_error_of_the_first_call() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import torch, llmkern; llmkern.nn.Embedding(3, 2)(torch.tensor([1]))"],
        env={**os.environ, "LLMKERN_CACHE_MB": "abc"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "ValueError: LLMKERN_CACHE_MB=abc; expected a whole number of MiB" in done.stderr
