"""A recurrent layer in chunks of time: states are kept between them, and the backward computes each chunk again.

Memory for the gates of one chunk in place of all, for a third more time. States go from chunk to chunk in fp32 (fp64),
as they go from step to step, so that the results are those without chunks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._facts import accumulate_dtype
from .._groups import RNN_PRIMALS, RNNCotangents, RNNInputs, RNNOptions
from ..reference._random import shifted
from ._autograd import differentiating, plain_backward, reference_vjp, takes
from .rnn import RNNFunction, reference_of, rnn, rnn_backward, rnn_forward, wanted


class _Chunk(NamedTuple):
    """Steps of a sequence: which of the tokens they are, and in which dimension."""

    first: int
    tokens: int
    dim: int
    batch_sizes: Tensor | None
    seed: Tensor | None

    def of(self, t: Tensor) -> Tensor:
        return t.narrow(self.dim, self.first, self.tokens).contiguous()

    def inputs(self, whole: RNNInputs, h: Tensor, c: Tensor | None) -> RNNInputs:
        """Those of the chunk, which begins with states ``h`` and ``c``."""
        return whole._replace(x=self.of(whole.x), hx=h, cx=c, batch_sizes=self.batch_sizes, seed=self.seed)


def _chunks(inputs: RNNInputs, options: RNNOptions, chunks: int) -> list[_Chunk]:
    """Chunks in the order of their computation. All have all sequences, of which some may have no step in a chunk."""
    batch_sizes, dim = inputs.batch_sizes, int(options.batch_first)
    # Tokens before each step.
    tokens = range(inputs.x.shape[dim] + 1) if batch_sizes is None else [0, *batch_sizes.cumsum(0).tolist()]
    steps, done, result = len(tokens) - 1, 0, []
    longest = -(-steps // chunks)
    begins = range(0, steps, longest)
    for begin in reversed(begins) if options.reverse else begins:
        end = min(begin + longest, steps)
        # Zoneout draws by the place of a step in the whole sequence.
        seed = None if inputs.seed is None else shifted(inputs.seed, done * inputs.hx.numel())
        sizes = None if batch_sizes is None else batch_sizes[begin:end]
        result.append(_Chunk(tokens[begin], tokens[end] - tokens[begin], dim, sizes, seed))
        done += end - begin
    return result


class RNNChunksFunction(RNNFunction):
    """(y, hy, cy, cells, h and c before each chunk); the last two have no gradient."""

    @staticmethod
    @takes(RNNInputs, "options", "chunks", "cells", "backend")
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        *tensors, options, chunks, cells, backend = arguments
        inputs = RNNInputs(*tensors)
        hx, cx, wide = inputs.hx, inputs.cx, accumulate_dtype(inputs.x.dtype)
        h, c = hx.to(wide), None if cx is None else cx.to(wide)
        starts, parts = [], []
        for chunk in _chunks(inputs, options, chunks):
            starts.append((h, h.new_empty(0) if c is None else c))
            y, h, cy, _, every, _ = rnn_forward(*chunk.inputs(inputs, h, c), *options, cells, backend)
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
        *tensors, before_h, before_c = ctx.saved_tensors
        inputs, needs, nothing = RNNInputs(*tensors), ctx.needs_input_grad, (None,) * 6
        x, hx, cx = inputs.x, inputs.hx, inputs.cx
        # The compiler gives zeros for what is empty because it was not wanted.
        dcells = dcells if ctx.cells and cx is not None else None
        dy = x.new_zeros((*x.shape[:-1], hx.shape[1])) if dy is None else dy
        dh = torch.zeros_like(hx) if dhy is None else dhy
        dc = None if cx is None else torch.zeros_like(cx) if dcy is None else dcy
        if not plain_backward():
            directions = tuple(d for d in (dy, dh, dc, dcells) if d is not None)
            function, primals = reference_of(inputs, ctx.options, len(directions))
            found = iter(reference_vjp(function, primals, directions))
            every = [None if t is None else next(found) for t in inputs[:RNN_PRIMALS]]
            return *(grad if need else None for grad, need in zip(every, needs, strict=False)), *nothing
        wide = accumulate_dtype(x.dtype)
        dh, dc = dh.to(wide).contiguous(), None if dc is None else dc.to(wide).contiguous()
        wants, dx, sums = (needs[0], True, any(needs[3:RNN_PRIMALS])), [], [None] * (RNN_PRIMALS - 3)
        chunks = _chunks(inputs, ctx.options, ctx.chunks)
        for i in reversed(range(len(chunks))):
            chunk = chunks[i]
            given = chunk.inputs(inputs, before_h[i], None if cx is None else before_c[i])
            y, _, _, *saved = rnn_forward(*given, *ctx.options, True, ctx.backend)
            cotangents = RNNCotangents(chunk.of(dy), dh, dc, None if dcells is None else chunk.of(dcells))
            part, dh, of_c, *of_weights = rnn_backward(
                *cotangents, *given, y, *saved, *ctx.options, *wants, ctx.backend
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


def rnn_in_chunks(inputs: RNNInputs, options: RNNOptions, backend: str, cells: bool, chunks: int) -> tuple[Tensor, ...]:
    """As :func:`llmkern.ops.rnn`, in ``chunks`` of time. Where there is nothing to save, or transforms of
    ``torch.func`` want a graph of every step, in one."""
    hooked = backend != "reference" and inputs.hx.shape[0] and differentiating(*inputs[:RNN_PRIMALS])
    if not hooked or torch._C._are_functorch_transforms_active():
        return rnn(inputs, options, backend, cells)
    return RNNChunksFunction.run(*inputs, options, chunks, cells, backend)[:4]
