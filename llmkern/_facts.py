"""Numbers that several layers, and both languages, have to agree about; a test compares them with the C++ core's."""

from __future__ import annotations

import torch

# The kinds of recurrent cell, in the order of `RnnMode` in csrc/core/rnn.h.
RNN_MODES = ("lstm", "gru", "rnn_tanh", "rnn_relu", "slstm")
# Rows of a recurrent weight, in hidden sizes.
GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1, "slstm": 4}
# Columns of a cell state, in hidden sizes; slstm's are c, n and m, side by side.
CELLS = {"lstm": 1, "gru": 0, "rnn_tanh": 0, "rnn_relu": 0, "slstm": 3}
# What a forward saves beside y, in hidden sizes: activated gates, and gru's W_hn h + b_hn, or slstm's sigmoid(f) beside
# the stabilised one. A plain Elman network saves nothing; with options that change its h, the activation.
SAVED_GATES = {"lstm": 4, "gru": 4, "rnn_tanh": 0, "rnn_relu": 0, "slstm": 5}
# The doubles of a `RowRecord` in csrc/core/row_optim.h.
ROW_RECORD = 31


def saved_gates(mode: str, clip: float, zoneout: float) -> int:
    return SAVED_GATES[mode] or int(clip != 0 or zoneout != 0)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums of numbers of ``dtype`` are kept in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
