"""The recurrent cases in JAX: a scan over the hidden products, with the input products of all steps taken out of it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import torch

from . import bench_rnn, peer_jax
from .suite import Call, Place, Run, namespace


def layer(
    kind: str, x: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any, w_hr: Any = None, *, reverse: bool = False
) -> Any:
    """One direction of one layer: x (T, B, I) -> y (T, B, H or projected)."""
    H, out = w_hh.shape[0] // bench_rnn.GATES[kind], w_hh.shape[1]
    zeros = jnp.zeros((x.shape[1], out), x.dtype)
    state = (zeros, jnp.zeros((x.shape[1], H), x.dtype)) if kind == "LSTM" else zeros
    step = _STEPS[kind]
    _, y = jax.lax.scan(lambda s, gx: step(s, gx, w_hh, b_hh, w_hr), state, x @ w_ih.T + b_ih, reverse=reverse)
    return y


def _lstm_step(state: Any, gx: Any, w_hh: Any, b_hh: Any, w_hr: Any) -> Any:
    h, c = state
    i, f, g, o = jnp.split(gx + h @ w_hh.T + b_hh, 4, axis=-1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    h = h if w_hr is None else h @ w_hr.T
    return (h, c), h


def _gru_step(h: Any, gx: Any, w_hh: Any, b_hh: Any, w_hr: Any) -> Any:
    xr, xz, xn = jnp.split(gx, 3, axis=-1)
    hr, hz, hn = jnp.split(h @ w_hh.T + b_hh, 3, axis=-1)
    r, z = jax.nn.sigmoid(xr + hr), jax.nn.sigmoid(xz + hz)
    h = (1 - z) * jnp.tanh(xn + r * hn) + z * h
    return h, h


def _rnn_step(h: Any, gx: Any, w_hh: Any, b_hh: Any, w_hr: Any) -> Any:
    h = jnp.tanh(gx + h @ w_hh.T + b_hh)
    return h, h


_STEPS = {"LSTM": _lstm_step, "GRU": _gru_step, "RNN": _rnn_step}


def sequence(run: Run, place: Place) -> Call:
    """A whole sequence, of all layers and directions."""
    sizes = run.case.sizes
    kind, variant = sizes["kind"], sizes["variant"]
    module, x, dy = bench_rnn.draw(namespace("torch"), sizes, place)
    named = dict(module.named_parameters())
    suffixes = ("", "_reverse") if variant == "bidirectional" else ("",)
    groups = [
        [[n for n in named if n.endswith(f"_l{k}{suffix}")] for suffix in suffixes] for k in range(sizes["layers"])
    ]
    packed: tuple[Any, ...] = ()
    if variant == "packed":
        # Rows of the packed data, in its order: by step, then by sequence. What stands after the end of a sequence
        # does not reach back into it.
        lengths = bench_rnn.lengths_of(sizes)
        t, b = torch.nonzero(torch.arange(sizes["T"])[:, None] < lengths[None, :], as_tuple=True)
        packed = peer_jax.to_jax(t), peer_jax.to_jax(b)
        x, dy = x[t, b], dy[t, b]

    def forward(x: Any, *rest: Any) -> Any:
        by_name, packed = dict(zip(named, rest, strict=False)), rest[len(named) :]
        if packed:
            x = jnp.zeros((sizes["T"], sizes["B"], sizes["I"]), x.dtype).at[packed].set(x)
        for group in groups:
            sides = [layer(kind, x, *(by_name[n] for n in names), reverse=k > 0) for k, names in enumerate(group)]
            x = jnp.concatenate(sides, -1) if sides[1:] else sides[0]
        return x[packed] if packed else x

    arguments = {"dx": peer_jax.to_jax(x), **{f"d{name}": peer_jax.to_jax(p) for name, p in named.items()}}
    return peer_jax.pulled_back(run, forward, "y", arguments, packed, peer_jax.to_jax(dy))


def steps(run: Run, place: Place) -> Call:
    """Steps one by one: a compiled step called T times for decoding, or all steps in one program for training."""
    sizes = run.case.sizes
    B, H = sizes["B"], sizes["H"]
    module, x, dh = bench_rnn.draw_steps(namespace("torch"), sizes, place)
    weights = tuple(peer_jax.to_jax(p) for p in module.parameters())
    inputs = [peer_jax.to_jax(one) for one in x]
    zeros = jnp.zeros((B, H), inputs[0].dtype)

    def cell(x: Any, state: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any) -> Any:
        return _lstm_step(state, x @ w_ih.T + b_ih, w_hh, b_hh, None)[0]

    if run.phase == "forward":
        one = jax.jit(cell)

        def decode() -> dict[str, Any]:
            state = (zeros, zeros)
            for x in inputs:
                state = one(x, state, *weights)
            return {"h": state[0], "c": state[1]}

        return decode

    @jax.jit
    def both(x: Any, dh: Any, *weights: Any) -> Any:
        def unrolled(*weights: Any) -> Any:
            return jax.lax.scan(lambda s, x: (cell(x, s, *weights), None), (zeros, zeros), x)[0]

        (h, c), pullback = jax.vjp(unrolled, *weights)
        return h, c, pullback((dh, jnp.zeros_like(c)))

    whole, dh = peer_jax.to_jax(x), peer_jax.to_jax(dh)

    def call() -> dict[str, Any]:
        h, c, grads = both(whole, dh, *weights)
        names = (f"d{name}" for name, _ in module.named_parameters())
        return {"h": h, "c": c, **dict(zip(names, grads, strict=True))}

    return call
