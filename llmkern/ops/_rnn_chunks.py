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
    """Steps of a sequence: which of the tokens they are, in which dimension, of how many sequences."""

    options: Options
    first: int
    tokens: int
    dim: int
    rows: int
    batch_sizes: Tensor | None
    drawn: Tensor | None

    def of(self, t: Tensor) -> Tensor:
        return t.narrow(self.dim, self.first, self.tokens).contiguous()


def _cut(inputs: Sequence[Any], options: Options, chunks: int) -> list[_Chunk]:
    """Chunks in the order of their computation."""
    x, hx, batch_sizes, drawn = inputs[0], inputs[1], inputs[10], inputs[11]
    dim, (B, width) = int(options.batch_first), hx.shape
    rows = [B] * x.shape[dim] if batch_sizes is None else batch_sizes.tolist()
    longest, done, cut = -(-len(rows) // chunks), 0, []
    begins = range(0, len(rows), longest)
    for begin in reversed(begins) if options.reverse else begins:
        here = rows[begin : begin + longest]
        # Zoneout draws by the place of a step in the whole sequence.
        offset = done * B * width
        seed = shifted(options.seed, offset) if options.seed >= 0 else -1
        first, tokens = (begin, len(here)) if batch_sizes is None else (sum(rows[:begin]), sum(here))
        sizes = None if batch_sizes is None else batch_sizes[begin : begin + longest]
        later = None if drawn is None else shifted(drawn, offset)
        cut.append(_Chunk(options._replace(seed=seed), first, tokens, dim, here[0], sizes, later))
        done += len(here)
    return cut


def _then(new: Tensor, old: Tensor) -> Tensor:
    """The states of all sequences, of which the first have new ones."""
    return new if len(new) == len(old) else torch.cat([new, old[len(new) :]])


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
            n = chunk.rows
            starts.append((h, h.new_empty(0) if c is None else c))
            states = (h[:n], None if c is None else c[:n])
            y, hy, cy, _, every, _ = rnn_forward(
                chunk.of(x), *states, *weights, chunk.batch_sizes, chunk.drawn, *chunk.options, cells, backend
            )
            h, c = _then(hy, h), None if c is None else _then(cy, c)
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
        dh, dc = dh.to(accumulate_dtype(x.dtype)), None if dc is None else dc.to(accumulate_dtype(x.dtype))
        wants, dx, sums = (needs[0], True, any(needs[3:10])), [], [None] * 7
        cut = _cut(inputs, ctx.options, ctx.chunks)
        for i in reversed(range(len(cut))):
            chunk, n = cut[i], cut[i].rows
            states = (before_h[i, :n], None if cx is None else before_c[i, :n])
            given = (chunk.of(x), *states, *inputs[3:10], chunk.batch_sizes, chunk.drawn)
            y, _, _, *saved = rnn_forward(*given, *chunk.options, True, ctx.backend)
            cotangents = (chunk.of(dy), dh[:n].contiguous(), None if dc is None else dc[:n].contiguous())
            cell_part = None if dcells is None else chunk.of(dcells)
            part, of_h, of_c, *of_weights = rnn_backward(
                *cotangents, cell_part, *given, y, *saved, *chunk.options, *wants, ctx.backend
            )
            dx.append(part)
            dh, dc = _then(of_h, dh), None if dc is None else _then(of_c, dc)
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
