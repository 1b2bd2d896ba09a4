"""The Triton kernels of cross-entropy: every way that a row can go, at the edges of its blocks."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as TF
from checks import INTERPRETING
from torch import Tensor

from llmkern import dispatch, reference
from llmkern._groups import LossOptions

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif("Triton" in (dispatch.unavailable("triton") or ""), reason="no Triton"),
]
interpreted = pytest.mark.skipif(not INTERPRETING, reason="runs kernels on the CPU")
PLAIN = LossOptions()
EVERY = LossOptions(-100, 0.1, 0.1, 3.0, -0.7)
INF, NAN = float("inf"), float("nan")
META = torch.device("meta")


@pytest.fixture
def module() -> Any:
    return importlib.import_module("llmkern.kernels.cross_entropy")


@pytest.fixture(params=["held", "twice", "slices"])
def way(request: pytest.FixtureRequest, module: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """How rows go, whatever their size says; a block is 4096 classes, a slice 8192."""
    if request.param != "held":
        monkeypatch.setattr(module, "_blocks", lambda *_: None)
    monkeypatch.setattr(module, "_is_split", lambda *_: request.param == "slices")
    return request.param


def problem(N: int, V: int, dtype: torch.dtype, soft: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, target and class weights."""
    logits, weight = (2 * torch.randn(N, V)).to(dtype), (0.5 + torch.rand(V)).to(dtype)
    if soft:
        return logits, torch.randn(N, V).softmax(1).to(dtype), weight
    target = torch.randint(V, (N,))
    target[N // 2] = -100
    target[-1] = V - 1
    return logits, target, weight


def right(logits: Tensor, target: Tensor, weight: Tensor, options: Any, *cotangents: Tensor) -> list[Tensor]:
    """Outputs in fp64, and the gradients of logits and probabilities."""
    leaves = [t.double().requires_grad_() for t in (logits, target) if t.is_floating_point()]
    outputs = reference.cross_entropy(leaves[0], leaves[-1] if len(leaves) > 1 else target, weight.double(), options)
    gradients = torch.autograd.grad(outputs[:3], leaves, [c.double() for c in cotangents])
    return [*(t.detach() for t in outputs), *gradients]


def compare(got: Any, want: Any) -> None:
    for a, e in zip(got, want, strict=True):
        if a.dtype == torch.int64:
            assert torch.equal(a, e)
        else:
            precision = 4 * torch.finfo(a.dtype).eps
            torch.testing.assert_close(a.double(), e.double(), rtol=precision, atol=precision * float(e.abs().max()))


@interpreted
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("options", [PLAIN, EVERY], ids=str)
@pytest.mark.parametrize("V", [1, 17, 4095, 4096, 8193])
def test_edges_of_blocks(way: str, module: Any, V: int, options: Any, soft: bool) -> None:
    dtype = torch.float32 if options == EVERY else torch.bfloat16
    logits, target, weight = problem(2, V, dtype, soft)
    cotangents = [torch.randn(2) for _ in range(3)]
    want = right(logits, target, weight, options, *cotangents)
    outputs = module.cross_entropy_forward(logits, target, weight, None, options, True, True, False, False)
    assert outputs[4].numel() == outputs[5].numel() == 0
    gradients = module.cross_entropy_backward(*cotangents, logits, target, weight, options, True, soft)
    compare([*outputs[:4], *gradients[: 1 + soft]], want)
    *of_loss, dlogits, dtarget = module.cross_entropy_forward(
        logits, target, weight, cotangents[0], options, True, True, True, soft
    )
    again = module.cross_entropy_backward(cotangents[0], None, None, logits, target, weight, options, True, soft)
    assert all(torch.equal(a, b) for a, b in zip((*of_loss, dlogits, dtarget), (*outputs[:4], *again), strict=True))


@interpreted
@pytest.mark.parametrize(("N", "V"), [(63, 5), (64, 5), (65, 5), (5, 1000)])
def test_several_rows_a_program(module: Any, N: int, V: int) -> None:
    logits, target, weight = problem(N, V, torch.float32, False)
    cotangents = [torch.randn(N) for _ in range(3)]
    outputs = module.cross_entropy_forward(logits, target, weight, None, EVERY, True, True, False, False)[:4]
    gradient = module.cross_entropy_backward(*cotangents, logits, target, weight, EVERY, True, False)[0]
    compare([*outputs, gradient], right(logits, target, weight, EVERY, *cotangents))


@interpreted
@pytest.mark.parametrize("D", [1, 15, 65])
@pytest.mark.parametrize("V", [3, 33])
def test_classes_apart(module: Any, monkeypatch: pytest.MonkeyPatch, V: int, D: int) -> None:
    logits, target = torch.randn(2, V, D), torch.randint(V, (2, D))
    target[1, D // 2] = -100
    leaf = logits.clone().requires_grad_()
    want = TF.cross_entropy(leaf, target, reduction="none")
    cotangent = torch.randn(2, D)
    (dwant,) = torch.autograd.grad(want, leaf, cotangent)
    logits[1, :, D // 2] = NAN
    best = logits.argmax(1).where(target >= 0, -1)
    for tile in (module._blocks, lambda *_: None):
        monkeypatch.setattr(module, "_blocks", tile)
        results = module.cross_entropy_forward(logits, target, None, cotangent, PLAIN, False, True, True, False)
        compare([results[0], results[3], results[4]], [want.detach(), best, dwant])


@interpreted
def test_infinities_and_nan_in_whole_blocks(way: str, module: Any) -> None:
    """A block, or a slice, of -inf is nothing; a row of it, or one with +inf or NaN, is what torch says it is."""
    V = 8300
    logits = torch.randn(6, V)
    logits[0, :8200] = -INF
    logits[1, 4000:] = -INF
    logits[2] = -INF
    logits[3, 8250] = INF
    logits[4, 8250] = NAN
    logits[4, 8299] = INF
    logits[5, 8200:] = 3e38
    target = torch.tensor([8299, 0, 1, 2, 3, 8290])
    leaf = logits.clone().requires_grad_()
    want = TF.cross_entropy(leaf, target, reduction="none")
    (dwant,) = torch.autograd.grad(want.sum(), leaf)
    loss, lse, _, argmax, dlogits, _ = module.cross_entropy_forward(
        logits, target, None, torch.ones(6), PLAIN, True, True, True, False
    )
    for got, expected in ((loss, want), (lse, logits.logsumexp(1)), (dlogits, dwant)):
        torch.testing.assert_close(got, expected, equal_nan=True)
    assert argmax.tolist() == [*logits[:3].argmax(1).tolist(), 8250, 8250, 8200]


@interpreted
def test_ignored_rows_are_not_read(way: str, module: Any) -> None:
    logits, target, weight = problem(3, 4100, torch.float32, False)
    logits[1] = NAN
    results = module.cross_entropy_forward(logits, target, weight, torch.ones(3), EVERY, True, True, True, False)
    assert [float(t[1]) for t in results[:4]] == [0, 0, 0, -1]
    assert not results[4][1].any()
    assert not results[4].isnan().any()


@interpreted
def test_in_place(way: str, module: Any) -> None:
    """The same bits where the logits were; nothing is written if a target is out of range."""
    logits, target, weight = problem(3, 4100, torch.bfloat16, False)
    dloss, place = torch.randn(3), logits.clone()
    want = module.cross_entropy_forward(logits, target, weight, dloss, PLAIN, False, False, True, False)
    got = module.cross_entropy_forward_(place, target, weight, dloss, PLAIN, False, False, False)
    assert torch.equal(got[0], want[0])
    assert torch.equal(place, want[4])
    place, target[2] = logits.clone(), 4100
    with pytest.raises(IndexError, match="Target 4100 is out of bounds"):
        module.cross_entropy_forward_(place, target, weight, dloss, PLAIN, False, False, False)
    assert torch.equal(place, logits)


@interpreted
def test_the_same_bits_for_any_grid(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, target, weight = problem(5, 4100, torch.float32, False)
    monkeypatch.setattr(module, "_blocks", lambda *_: None)
    monkeypatch.setattr(module, "_is_split", lambda *_: False)
    results = []
    for count in (132, 1):
        monkeypatch.setattr(module, "multiprocessors", lambda _, count=count: count)
        results.append(
            module.cross_entropy_forward(logits, target, weight, torch.ones(5), EVERY, True, True, True, False)
        )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@interpreted
def test_more_than_two_to_the_31_logits(way: str, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last row of them, by the programs that have it; the others would take the interpreter an hour. The logits are
    zeros, which take no memory as long as nobody writes to them."""
    from llmkern.kernels import _softmax_blocks
    from triton.runtime.interpreter import InterpreterBuilder

    N, V = (1 << 17) + 3, 16384
    original = InterpreterBuilder.create_get_program_id
    first, launch = [0], module.launch

    def launch_last(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        name = kernel.fn.__name__
        first[0] = {"loop": N - 1}.get(name.split("_")[2], grid[0] - 1)
        launch(kernel, (1, *grid[1:]), *arguments, **constants)

    def program_id(self: Any, axis: int) -> Any:
        handle = original(self, axis)
        return handle if axis else type(handle)(handle.data + first[0], handle.dtype)

    for home in (module, _softmax_blocks):
        monkeypatch.setattr(home, "launch", launch_last)
    monkeypatch.setattr(InterpreterBuilder, "create_get_program_id", program_id)
    libc = ctypes.CDLL(None)
    libc.calloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    block = libc.calloc(ctypes.c_size_t(N * V), ctypes.c_size_t(2))
    try:
        logits = torch.frombuffer((ctypes.c_char * (2 * N * V)).from_address(block), dtype=torch.bfloat16).view(N, V)
        logits[-1, -1] = 5
        target = torch.full((N,), -100)
        target[-1] = V - 1
        rows = module.cross_entropy_forward_(logits, target, None, torch.ones(N), PLAIN, False, True, False)
        want = torch.zeros(V).index_fill(0, torch.tensor(V - 1), 5).double()
        torch.testing.assert_close(rows[0][-1].double(), want.logsumexp(0) - 5)
        assert rows[3][-1] == V - 1
        gradient = want.softmax(0)
        gradient[-1] -= 1
        torch.testing.assert_close(logits[-1], gradient.bfloat16())
        assert not logits[:2].any()
        assert not logits[-3:-1].any()
    finally:
        libc.free(block)


@pytest.mark.skipif(INTERPRETING, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("V", [1000, 16000, 32000, 128256])
def test_batches_share_their_code(module: Any, V: int) -> None:
    """Neither the number of rows nor the ignored index is compiled in."""
    from kernel_gate import unit
    from llmkern.kernels import _launch

    def compiled(N: int, ignore_index: int) -> list[Any]:
        logits, target = torch.empty(N, V, device=META), torch.empty(N, dtype=torch.int64, device=META)
        dloss, options = torch.empty(N, device=META), PLAIN._replace(ignore_index=ignore_index)
        with _launch.recording() as launches:
            module.cross_entropy_forward(logits, target, None, dloss, options, False, False, True, False)
        return [(made.name, made.source.signature, made.source.constants) for made in map(unit, launches)]

    assert compiled(7, -100) == compiled(16, -100) == compiled(1, 1)
    assert compiled(1000, -100) == compiled(1024, 16)


def test_which_way(module: Any) -> None:
    """Few programs for many rows: as many as the cache holds rows of."""
    from llmkern.kernels import _launch

    def launched(N: int, V: int, dtype: torch.dtype = torch.bfloat16) -> list[tuple[str, tuple[int, ...]]]:
        logits, target = torch.empty(N, V, dtype=dtype, device=META), torch.empty(N, dtype=torch.int64, device=META)
        with _launch.recording() as launches:
            module.cross_entropy_forward(
                logits, target, None, torch.empty(N, device=META), PLAIN, False, False, True, False
            )
        return [(made.kernel.__name__.removeprefix("cross_entropy_"), made.grid) for made in launches]

    assert launched(8192, 16384) == [("rows_kernel", (8192,))]
    assert launched(8192, 16385) == [("loop_kernel", (4 * 132,))]
    assert launched(8192, 128256) == [("loop_kernel", (2 * 132,))]
    assert launched(8192, 128256, torch.float32) == [("loop_kernel", (132,))]
    assert launched(1 << 20, 10) == [("rows_kernel", (1 << 14,))]
    names, grids = zip(*launched(66, 128256), strict=True)
    assert names == ("partials_kernel", "combine_kernel", "gradient_kernel")
    assert grids == ((66, 16), (3,), (66, 16))
