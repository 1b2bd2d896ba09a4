"""Pure PyTorch: what is right.

Every op in a few readable, differentiable lines, complete in its options. Tests and benchmarks compare with these
(in fp64), higher derivatives of the kernels run through them, and they serve what no kernel serves.
"""

from .cross_entropy import cross_entropy
from .dropout import dropout
from .embedding import embedding, embedding_row_scale
from .embedding_bag import embedding_bag
from .fused_embedding import fused_embedding
from .grad_norm import grad_norm, scale_
from .linear import linear
from .linear_cross_entropy import linear_cross_entropy
from .mse_loss import mse_loss
from .optim import adagrad_step, adam_step, advance, sgd_step
from .quantized_embedding import quantize_rows, quantized_embedding
from .rnn import rnn, rnn_step
from .row_optim import row_catch_up, row_lookup, row_step
from .sparse_optim import (
    rowwise_adagrad_step,
    sparse_adagrad_step,
    sparse_adam_step,
    sparse_grad_norm,
    sparse_sgd_step,
)

__all__ = [
    "adagrad_step",
    "adam_step",
    "advance",
    "cross_entropy",
    "dropout",
    "embedding",
    "embedding_bag",
    "embedding_row_scale",
    "fused_embedding",
    "grad_norm",
    "linear",
    "linear_cross_entropy",
    "mse_loss",
    "quantize_rows",
    "quantized_embedding",
    "rnn",
    "rnn_step",
    "row_catch_up",
    "row_lookup",
    "row_step",
    "rowwise_adagrad_step",
    "scale_",
    "sgd_step",
    "sparse_adagrad_step",
    "sparse_adam_step",
    "sparse_grad_norm",
    "sparse_sgd_step",
]
