"""Which backend serves what: one row per op, one entry per backend.

An *option* is the name of an argument that has other than its neutral value. An entry says which options its backend
knows. So an option that no kernel knows takes torch's own function: the same numbers, never an approximation. What
keeps a tensor from a kernel (``_plain.py``) is named like an option that no kernel knows.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from . import _plain
from ._plain import TRANSFORMS


class Work(NamedTuple):
    """What a rule of size may look at. Callers of ``pick`` give what the rules of their op read."""

    op: str
    dtype: torch.dtype
    options: Sequence[str]
    elements: int = 0
    products: int = 0
    steps: int = 0
    batch: int = 0
    units: int = 0
    dropout: bool = False
    grad: bool = False


# Why `auto` leaves a call that a backend serves to another, or None.
Rule = Callable[[Work], "str | None"]

_FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})


@dataclass(frozen=True)
class Support:
    """What one backend serves of one op: calls with these ``options``, or with ``all_but`` those without them; tensors
    on ``devices`` of ``dtypes`` (None: all); and in ``auto`` those calls about which ``unless`` says nothing, of at
    least so many elements."""

    options: frozenset[str] = frozenset()
    all_but: bool = False
    devices: frozenset[str] | None = None
    dtypes: frozenset[torch.dtype] | None = None
    unless: Rule | None = None
    least: int = 0

    def lacks(self, options: Iterable[str]) -> list[str]:
        return [option for option in options if (option in self.options) == self.all_but]

    def __str__(self) -> str:
        if not self.options:
            return "yes"
        return f"yes, {'but' if self.all_but else 'with'} {', '.join(sorted(self.options))}"


Row = dict[str, Support]


def _row(
    options: Iterable[str] = (),
    *,
    native_only: Iterable[str] = (),
    unless: Rule | None = None,
    native_unless: Rule | None = None,
    native_least: int = 0,
    triton_unless: Rule | None = None,
    torch_lacks: Iterable[str] | None = (),
    reference_lacks: Iterable[str] = (),
) -> Row:
    """A row of kernels for the CPU and for GPUs. ``torch_lacks=None``: torch has no such op."""
    known = frozenset(options)
    # Under its interpreter Triton runs on the CPU; `auto` never asks it there, as native code comes first.
    gpus = frozenset({"cuda", "cpu"} if os.environ.get("TRITON_INTERPRET") == "1" else {"cuda"})
    native, cpu = known | frozenset(native_only), frozenset({"cpu"})
    row = {
        "native": Support(native, False, cpu, _FLOATS, native_unless or unless, native_least),
        "triton": Support(known, False, gpus, _FLOATS, triton_unless or unless),
    }
    if torch_lacks is not None:
        row["torch"] = Support(frozenset(torch_lacks), all_but=True)
    row["reference"] = Support(frozenset(reference_lacks), all_but=True)
    return row


# --- rules ----------------------------------------------------------------------------------------------------------
def _batched(work: Work) -> str | None:
    return "torch.func batches torch's own function" if _plain.mapped() else None


def _transformed(work: Work) -> str | None:
    return "torch.func batches torch's own products" if torch._C._are_functorch_transforms_active() else None


def _linear_on_cpu(work: Work) -> str | None:
    """Measured: benchmarks/bench_linear.py."""
    if work.dtype != torch.float32:
        return f"torch's product of {work.dtype} is faster"
    return _transformed(work) or (None if work.products >= 1 << 21 else "too small to gain")


def _linear_on_gpu(work: Work) -> str | None:
    return "would call torch's product too"


def _layer_norm_on_cpu(work: Work) -> str | None:
    """Measured: benchmarks/bench_layer_norm.py. torch's forward of bfloat16 rows is as fast until it writes to
    fresh pages."""
    least = {torch.float64: 1 << 20, torch.bfloat16: 0 if work.grad else 1 << 24}.get(work.dtype, 0)
    return _batched(work) or (None if work.elements >= least else "too small to gain")


def _fused_embedding_on_cpu(work: Work) -> str | None:
    """Measured: benchmarks/bench_fused_embedding.py. A call of the op costs some 15 us more than three of torch's."""
    return None if work.elements >= 1 << (13 if work.dropout else 16) else "too small to gain"


def _lstm_on_cpu(work: Work) -> str | None:
    """Measured: benchmarks/bench_rnn.py. oneDNN's forward is up to 13% faster where many sequences share small weights;
    it has no packed sequences, projections or options."""
    if work.options or work.grad or work.steps == 1 or work.batch < 32:
        return None
    small = {torch.float32: 128, torch.bfloat16: 512}.get(work.dtype, 0)
    return "torch's forward without gradients is faster at this size" if work.units <= small else None


def _lstm_cell_on_cpu(work: Work) -> str | None:
    """Measured: benchmarks/bench_rnn.py, lstmcell."""
    if work.dtype == torch.bfloat16 and work.grad and work.batch >= 32:
        return "torch's steps with gradients in bfloat16 are faster at this size"
    return None


def _recurrent_on_gpu(work: Work) -> str | None:
    """What torch's cells and layers serve on a GPU stays theirs until a benchmark says otherwise."""
    if TABLE[work.op]["torch"].lacks(work.options):
        return None
    return "not yet measured against cuDNN on a GPU: backend('triton') takes it"


# --- rows -----------------------------------------------------------------------------------------------------------
_TORCH_LOSS = ("weight", "label_smoothing", "probabilities")
_LOSS_EXTRAS = ("z_loss", "softcap", "logit_scale", "token_weight", "outputs")
_LOSS = (*_TORCH_LOSS, *_LOSS_EXTRAS)
_TABLE = ("padding_idx", "max_norm", "scale_grad_by_freq", "sparse")

# Options that torch's recurrent layers do not have. Triton's kernels know no norms.
_RNN_EXTRAS = (
    "num_heads",
    "state_dtype",
    "clip",
    "zoneout",
    "weight_dropout",
    "variational_dropout",
    "return_cell_states",
    "checkpoint_chunks",
)
_LSTM_EXTRAS = (*_RNN_EXTRAS, "peepholes", "forget_bias", "zoneout_cell")

# What only torch's optimizers do. The last three with sparse gradients only.
_TORCH_STEPS = (
    "complex tensors",
    "tensors that do not fit together",
    "capturable",
    "differentiable",
    "several sparse dimensions",
    "momentum",
    "weight_decay",
)
_step = _row(["state_dtype"], torch_lacks=["state_dtype"], reference_lacks=_TORCH_STEPS)
_recurrent = _row(
    ["batch_sizes", *_RNN_EXTRAS],
    native_only=["norms"],
    triton_unless=_recurrent_on_gpu,
    torch_lacks=[*_RNN_EXTRAS, "norms", *TRANSFORMS],
)
_cell = _row(triton_unless=_recurrent_on_gpu, torch_lacks=TRANSFORMS)

TABLE: dict[str, Row] = {
    "cross_entropy": _row(_LOSS, unless=_batched, torch_lacks=_LOSS_EXTRAS),
    "nll_loss": {"torch": Support(all_but=True), "reference": Support(all_but=True)},
    "dropout": _row(),
    "embedding": _row(_TABLE, unless=_batched, reference_lacks=["sparse"]),
    "embedding_bag": _row(
        [*_TABLE, "per_sample_weights", "weighted_mean"],
        torch_lacks=["weighted_mean", *TRANSFORMS],
        reference_lacks=["sparse"],
    ),
    "fused_embedding": _row(native_unless=_fused_embedding_on_cpu),
    # Measured: a call of the op costs more than one of torch's. rms_norm is composed of eight functions there.
    "layer_norm": _row(unless=_batched, native_unless=_layer_norm_on_cpu, native_least=1 << 19),
    "rms_norm": _row(unless=_batched, native_least=1 << 17),
    "linear": _row(native_unless=_linear_on_cpu, triton_unless=_linear_on_gpu),
    "linear_cross_entropy": _row([*_LOSS, "options", "workspace"], unless=_transformed),
    "mse_loss": _row(),
    "quantized_embedding": _row(torch_lacks=None),
    "lstm": _row(
        ["batch_sizes", *_LSTM_EXTRAS],
        native_only=["norms", "proj_size"],
        native_unless=_lstm_on_cpu,
        triton_unless=_recurrent_on_gpu,
        torch_lacks=[*_LSTM_EXTRAS, "norms", "clipped_projection", *TRANSFORMS],
    ),
    "gru": _recurrent,
    "rnn_tanh": _recurrent,
    "rnn_relu": _recurrent,
    "slstm": _row(["batch_sizes", *_RNN_EXTRAS], native_only=["norms"], torch_lacks=None),
    "lstm_cell": _row(native_unless=_lstm_cell_on_cpu, triton_unless=_recurrent_on_gpu, torch_lacks=TRANSFORMS),
    "gru_cell": _cell,
    "rnn_tanh_cell": _cell,
    "rnn_relu_cell": _cell,
    "grad_norm": _row(reference_lacks=["norm_type"]),
    "adam": _step,
    "sgd": _step,
    "adagrad": _step,
    "row_optim": _row(torch_lacks=None),
    "sparse_sgd": _step,
    "sparse_adagrad": _step,
    "sparse_adam": _step,
    "sparse_grad_norm": _row(["state_dtype"], reference_lacks=["norm_type", "several sparse dimensions"]),
    "rowwise_adagrad": _row(["state_dtype"], torch_lacks=None),
}
