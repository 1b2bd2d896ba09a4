"""Optimizer steps. Floor: parameter, gradient and states read once, parameter and states written once; of a sparse
gradient's table, the rows that it names. Clipping reads the gradients once more."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from .suite import Call, Case, Cost, Place, Run, measure

# The tensors of the language model of bench_model: embedding, two LSTM layers, head.
LM = ((32000, 512), *(((2048, 512), (2048, 512), (2048,), (2048,)) * 2), (32000, 512), (32000,))
STATES = {"SGD": 0, "Adagrad": 1, "Adam": 2, "AdamW": 2}


def draw(shapes: tuple[tuple[int, ...], ...], place: Place) -> list[torch.Tensor]:
    """Parameters with their gradients."""
    g = place.generator()
    parameters = [place(torch.randn(shape, generator=g)).requires_grad_() for shape in shapes]
    for parameter in parameters:
        parameter.grad = place(torch.randn(parameter.shape, generator=g))
    return parameters


def make(
    optimizer: str,
    shapes: tuple[tuple[int, ...], ...] = LM,
    quick: tuple[str, ...] = (),
    clip: float | None = None,
    **options: Any,
) -> Case:
    """``clip``: to this norm, as part of the step or by torch's ``clip_grad_norm_`` before it."""
    numel = sum(torch.Size(shape).numel() for shape in shapes)
    sizes = {"optimizer": optimizer, "shapes": shapes, **({"clip": clip} if clip else {}), **options}
    states = STATES[optimizer] + ("momentum" in options)

    def cost(phase: str, itemsize: int) -> Cost:
        reads = (2 + states + (clip is not None)) * numel * itemsize
        return Cost(10.0 * numel, reads, (1 + states) * numel * itemsize)

    def setup(ns: SimpleNamespace, phase: str, place: Place) -> Call:
        parameters = draw(shapes, place)
        # torch's fastest way of doing it; ours has one way.
        own: dict[str, Any] = {"fused": True} if ns.name == "torch" else {"max_grad_norm": clip}
        stepper = getattr(ns.optim, optimizer)(parameters, lr=1e-3, **options, **own)

        def run() -> dict[str, Any]:
            if clip is not None and ns.name == "torch":
                torch.nn.utils.clip_grad_norm_(parameters, clip)
            stepper.step()
            return {str(i): parameter for i, parameter in enumerate(parameters)}

        return run

    name = f"optim/{optimizer.lower()}/lm" + "".join(f"/{k}={v}" for k, v in options.items()) + "/clip" * bool(clip)
    problem = "optim_clip" if clip else "optim"
    return Case("optim", name, problem, ("step",), cost, setup, sizes, quick=quick, exact=numel < 1e7)


# The table of a large vocabulary, and the tokens of a batch.
TABLE, TOKENS = (128256, 2048), 8192


class ComposedRowWiseAdagrad:
    """What torch does not have, of what it has."""

    def __init__(self, parameters: list[torch.Tensor], lr: float, eps: float = 1e-10) -> None:
        (self.table,) = parameters
        self.sum, self.lr, self.eps = self.table.new_zeros(len(self.table)), lr, eps

    @torch.no_grad()
    def step(self) -> None:
        assert self.table.grad is not None
        grad = self.table.grad.coalesce()
        rows, values = grad._indices()[0], grad._values()
        self.sum.index_add_(0, rows, values.square().mean(1))
        self.table.index_add_(0, rows, values / (self.sum[rows].sqrt() + self.eps)[:, None], alpha=-self.lr)


def make_sparse(optimizer: str, shape: tuple[int, int] = TABLE, tokens: int = TOKENS) -> Case:
    """One step on a sparse gradient whose rows come as a batch of uniform tokens gives them."""
    states = {"SGD": 0, "Adagrad": 1, "SparseAdam": 2, "RowWiseAdagrad": 0}[optimizer]

    def cost(phase: str, itemsize: int) -> Cost:
        numel = tokens * shape[1] * itemsize
        return Cost(10.0 * tokens * shape[1], (2 + states) * numel, (1 + states) * numel)

    def setup(ns: SimpleNamespace, phase: str, place: Place) -> Call:
        g = place.generator()
        table = place(torch.randn(shape, generator=g)).requires_grad_()
        rows = torch.randint(shape[0], (1, tokens), generator=g)
        values = place(torch.randn(tokens, shape[1], generator=g))
        table.grad = torch.sparse_coo_tensor(rows.to(values.device), values, shape, check_invariants=False)
        composed = ns.name == "torch" and optimizer == "RowWiseAdagrad"
        stepper = (ComposedRowWiseAdagrad if composed else getattr(ns.optim, optimizer))([table], lr=1e-3)

        def run() -> dict[str, Any]:
            stepper.step()
            return {"table": table}

        return run

    name = f"optim/{optimizer.lower()}/sparse/V={shape[0]}/D={shape[1]}/N={tokens}"
    sizes = {"optimizer": optimizer, "V": shape[0], "D": shape[1], "N": tokens}
    return Case("optim", name, "sparse_optim", ("step",), cost, setup, sizes, dtypes=("fp32",), exact=False)


CASES = [
    make("Adam", quick=("step",)),
    make("AdamW"),
    make("SGD", momentum=0.9),
    make("Adagrad"),
    make("Adam", clip=1.0),
    *(make_sparse(name) for name in ("SGD", "Adagrad", "SparseAdam", "RowWiseAdagrad")),
]


def test_optim(benchmark: Any, run: Run, implementation: str) -> None:
    measure(benchmark, run, implementation)
