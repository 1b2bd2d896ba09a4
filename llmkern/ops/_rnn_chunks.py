"""A recurrent layer in chunks of time: states are kept between them, and the backward computes each chunk again.

Memory for the gates of one chunk in place of all, for a third more time. States go from chunk to chunk in fp32 (fp64),
as they go from step to step, so that the results are those without chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._facts import accumulate_dtype
from ..reference._random import shifted
from ._autograd import differentiating, plain_backward, reference_vjp
from .rnn import Options, RNNFunction, reference_of, rnn, rnn_backward, rnn_forward, wanted


class _Chunk(NamedTuple):
    """Steps of a sequence: which of the tokens they are, and in which dimension."""

    options: Options
    first: int
    tokens: int
    dim: int
    batch_sizes: Tensor | None
    drawn: Tensor | None

    def of(self, t: Tensor) -> Tensor:
        return t.narrow(self.dim, self.first, self.tokens).contiguous()


def _cut(inputs: Sequence[Any], options: Options, chunks: int) -> list[_Chunk]:
    """Chunks in the order of their computation. All have all sequences, of which some may have no step in a chunk."""
    x, hx, batch_sizes, drawn = inputs[0], inputs[1], inputs[10], inputs[11]
    dim = int(options.batch_first)
    # Tokens before each step.
    tokens = range(x.shape[dim] + 1) if batch_sizes is None else [0, *batch_sizes.cumsum(0).tolist()]
    steps, done, cut = len(tokens) - 1, 0, []
    longest = -(-steps // chunks)
    begins = range(0, steps, longest)
    for begin in reversed(begins) if options.reverse else begins:
        end = min(begin + longest, steps)
        # Zoneout draws by the place of a step in the whole sequence.
        offset = done * hx.numel()
        seed = shifted(options.seed, offset) if options.seed >= 0 else -1
        later = None if drawn is None else shifted(drawn, offset)
        sizes = None if batch_sizes is None else batch_sizes[begin:end]
        first = tokens[begin]
        cut.append(_Chunk(options._replace(seed=seed), first, tokens[end] - first, dim, sizes, later))
        done += end - begin
    return cut


class RNNChunksFunction(RNNFunction):
    """(y, hy, cy, cells, h and c before each chunk); the last two have no gradient."""

    @staticmethod
    def forward(  # type: ignore[override]
        x: Tensor,
        hx: Tensor,
        cx: Tensor | None,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias_ih: Tensor | None,
        bias_hh: Tensor | None,
        weight_hr: Tensor | None,
        peephole: Tensor | None,
        norms: Tensor | None,
        batch_sizes: Tensor | None,
        drawn: Tensor | None,
        options: Options,
        chunks: int,
        cells: bool,
        backend: str,
    ) -> tuple[Tensor, ...]:
        weights = (weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, peephole, norms)
        h, c = hx.to(accumulate_dtype(x.dtype)), None if cx is None else cx.to(accumulate_dtype(x.dtype))
        cut = _cut((x, hx, cx, *weights, batch_sizes, drawn), options, chunks)
        starts, parts = [], []
        for chunk in cut:
            starts.append((h, h.new_empty(0) if c is None else c))
            y, h, cy, _, every, _ = rnn_forward(
                chunk.of(x), h, c, *weights, chunk.batch_sizes, chunk.drawn, *chunk.options, cells, backend
            )
            c = None if c is None else cy
            parts.append((y, every))
        ys, every_c = zip(*(parts[::-1] if options.reverse else parts), strict=True)
        dim, befores = int(options.batch_first), [torch.stack(states) for states in zip(*starts, strict=True)]
        final_c = hx.new_empty(0) if c is None else c.to(hx.dtype, copy=True)
        joined_c = torch.cat(every_c, dim if cells and cx is not None else 0)
        return torch.cat(ys, dim), h.to(hx.dtype, copy=True), final_c, joined_c, *befores

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.options, ctx.chunks, ctx.cells, ctx.backend = inputs
        _, _, cy, cells, *befores = output
        without = [*([] if ctx.cells else [cells]), *([] if tensors[2] is not None else [cy, cells])]
        ctx.mark_non_differentiable(*befores, *without)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *befores)
        ctx.save_for_forward(*tensors, *befores)

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, dhy: Tensor | None, dcy: Tensor | None, dcells: Tensor | None, *_: Any
    ) -> tuple[Tensor | None, ...]:
        *inputs, before_h, before_c = ctx.saved_tensors
        x, hx, cx, needs, nothing = inputs[0], inputs[1], inputs[2], ctx.needs_input_grad, (None,) * 6
        # The compiler gives zeros for what is empty because it was not wanted.
        dcells = dcells if ctx.cells and cx is not None else None
        dy = x.new_zeros((*x.shape[:-1], hx.shape[1])) if dy is None else dy
        dh = torch.zeros_like(hx) if dhy is None else dhy
        dc = None if cx is None else torch.zeros_like(cx) if dcy is None else dcy
        if not plain_backward():
            directions = tuple(d for d in (dy, dh, dc, dcells) if d is not None)
            function, primals = reference_of(inputs, ctx.options, len(directions))
            found = iter(reference_vjp(function, primals, directions))
            every = [None if t is None else next(found) for t in inputs[:10]]
            return *(grad if need else None for grad, need in zip(every, needs, strict=False)), *nothing
        wide = accumulate_dtype(x.dtype)
        dh, dc = dh.to(wide).contiguous(), None if dc is None else dc.to(wide).contiguous()
        wants, dx, sums = (needs[0], True, any(needs[3:10])), [], [None] * 7
        cut = _cut(inputs, ctx.options, ctx.chunks)
        for i in reversed(range(len(cut))):
            chunk, states = cut[i], (before_h[i], None if cx is None else before_c[i])
            given = (chunk.of(x), *states, *inputs[3:10], chunk.batch_sizes, chunk.drawn)
            y, _, _, *saved = rnn_forward(*given, *chunk.options, True, ctx.backend)
            cell_part = None if dcells is None else chunk.of(dcells)
            part, dh, of_c, *of_weights = rnn_backward(
                chunk.of(dy), dh, dc, cell_part, *given, y, *saved, *chunk.options, *wants, ctx.backend
            )
            dx.append(part)
            dc = None if dc is None else of_c
            sums = [d if total is None else total + d for total, d in zip(sums, of_weights, strict=True)]
        whole = torch.cat(dx if ctx.options.reverse else dx[::-1], int(ctx.options.batch_first)) if needs[0] else None
        grads = (whole, dh.to(hx.dtype), None if cx is None or dc is None else dc.to(cx.dtype), *sums)
        return *wanted(grads, inputs, needs), *nothing

    @staticmethod
    def tangent(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        y, hy, cy, cells, *nothing = RNNFunction.tangent(ctx, *tangents)
        return y, hy, cy, cells if ctx.cells else None, *nothing


def rnn_in_chunks(
    inputs: Sequence[Any], options: Options, chunks: int, cells: bool, drawn: Tensor | None, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :func:`llmkern.ops.rnn`, whose first eleven arguments are ``inputs``, in ``chunks`` of time. Where there is
    nothing to save, or transforms of ``torch.func`` want a graph of every step, in one."""
    primals = inputs[:10]
    hooked = backend != "reference" and inputs[1].shape[0] and differentiating(*primals)
    if not hooked or torch._C._are_functorch_transforms_active():
        return rnn(*inputs[:11], options, backend, cells, drawn)  # type: ignore[call-arg]
    return RNNChunksFunction.run(*inputs, drawn, options, chunks, cells, backend)[:4]
