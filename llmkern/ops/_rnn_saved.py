"""What a recurrent layer keeps for its backward, and what may change before it.

Autograd refuses a backward if anything that was saved has been changed in place. Here that is too strict twice. What
the wanted gradients do not read may change: an optimizer may step between two backward passes through a cell whose
input needs no gradient. And h before a step is the y of the step before, which belongs to the caller, who may overwrite
it (``ReLU(inplace=True)``): then the forward runs again, and gives what it gave.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .._groups import RNNInputs
from ._autograd import plain_backward, pure

_INPUTS = len(RNNInputs._fields)
_X, _HX, _CX, _WEIGHT_IH, _WEIGHT_HH, _BIAS_IH, _BIAS_HH, _WEIGHT_HR, _PEEPHOLE, _NORMS, _BATCH_SIZES = range(11)
# Behind the inputs: y, gates, cells, normed. A caller gets the first and the third.
_Y, _CELLS = _INPUTS, _INPUTS + 2


def keep(ctx: Any, inputs: Sequence[Tensor | None], results: Sequence[Tensor]) -> None:
    """Saves the ``inputs`` of a forward, and its ``results`` (y, gates, cells, normed)."""
    saved = (*inputs, *results)
    ctx.save_for_backward(*saved)
    ctx.versions = ctx.first_h = None
    if not pure():
        ctx.versions = [_version(t) for t in saved]
        ctx.places = {_Y: results[0].data_ptr(), _CELLS: results[2].data_ptr()}
        if ctx.options.mode == "gru" and not ctx.needs_input_grad[_WEIGHT_HH]:
            # Where torch keeps h - n, we read h. Of the first h only the caller has the memory.
            ctx.first_h = inputs[_HX].clone()  # type: ignore[union-attr]


def _version(t: Tensor | None) -> int:
    return 0 if t is None or t.is_inference() else t._version


def kept(ctx: Any, forward: Callable[..., tuple[Tensor, ...]]) -> Sequence[Tensor | None]:
    """The inputs and results as they were, but for what no wanted gradient reads. ``forward(*inputs)`` gives y, hy, cy,
    gates, cells and normed again.

    Raises:
        RuntimeError: torch's own, if something that is read was changed, or if a backward has freed it.
    """
    if ctx.versions is None:
        return ctx.saved_tensors
    try:
        tensors = ctx.saved_tensors
        # Where hooks saved them, autograd sees no change: then a result was changed if it is still in its place.
        changed = {i for i, place in ctx.places.items() if _changed(ctx, tensors, i) and tensors[i].data_ptr() == place}
        if not changed:
            return tensors
        unread = set()
    except RuntimeError:
        tensors = [saved.data for saved in ctx._raw_saved_tensors]
        changed = {i for i in range(len(tensors)) if _changed(ctx, tensors, i)}
        unread = _unread(ctx, tensors) if plain_backward() else set()
        if _HX in changed and ctx.first_h is not None and plain_backward():
            tensors[_HX] = ctx.first_h
            changed.remove(_HX)
        stale = not changed.isdisjoint(ctx.places.keys() - unread)
        if any(i < _INPUTS and (stale or i not in unread) for i in changed):
            raise
        if not stale:
            return tensors
    y, _, _, *others = forward(*tensors[:_INPUTS])
    return *tensors[:_INPUTS], y, *others


def _changed(ctx: Any, tensors: Sequence[Tensor | None], i: int) -> bool:
    return _version(tensors[i]) != ctx.versions[i]


def _unread(ctx: Any, tensors: Sequence[Any]) -> set[int]:
    """What no wanted gradient of a plain backward reads."""
    needs, options, batch_sizes, gates = ctx.needs_input_grad, ctx.options, tensors[_BATCH_SIZES], tensors[_Y + 1]
    steps = tensors[_X].shape[1 if options.batch_first else 0] if batch_sizes is None else batch_sizes.shape[0]
    earlier = needs[_WEIGHT_HH] or options.mode == "gru"  # h before a step
    elman = options.mode.startswith("rnn") and not gates.numel()
    # The first c only makes the gradient of the first forget gate, and of peepholes.
    gated = any(needs[:_CX]) or any(needs[_WEIGHT_IH:_WEIGHT_HR]) or options.mode != "lstm"
    read = {
        _X: needs[_WEIGHT_IH],
        _HX: earlier,
        _CX: gated or tensors[_PEEPHOLE] is not None or tensors[_NORMS] is not None,
        _WEIGHT_IH: needs[_X],
        _WEIGHT_HH: steps > 1 or needs[_HX],
        _BIAS_IH: False,
        _BIAS_HH: False,
        _WEIGHT_HR: steps > 1 or any(needs[:_WEIGHT_HR]),
        _Y: elman or (earlier and steps > 1),
    }
    return {i for i, wanted in read.items() if not wanted}
