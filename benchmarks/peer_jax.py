"""JAX on the CPU: the strongest peer for whole steps and linear + cross-entropy.

Each case once more in JAX, on the inputs that the torch version draws, so that results compare.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import torch

from .bench_embedding import indices_of
from .peers import Implementation
from .suite import Run

_DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16, "fp16": jnp.float16}


def _to_jax(tensor: torch.Tensor, dtype: Any = None) -> Any:
    return jnp.asarray(tensor.detach().numpy(), dtype=dtype)


def _cross_entropy(logits: Any, target: Any, smoothing: float) -> Any:
    logits = logits.astype(jnp.float32)
    lse = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, jnp.maximum(target, 0)[:, None], axis=-1)[:, 0]
    losses = lse - (1 - smoothing) * picked - smoothing * logits.mean(-1) if smoothing else lse - picked
    valid = target >= 0
    return jnp.where(valid, losses, 0).sum() / valid.sum()


class Peer(Implementation):
    def setup(self, run: Run, device: str) -> Callable[[], dict[str, Any]]:
        build = getattr(self, f"_setup_{run.case.op}", None)
        if build is None or device != "cpu":
            raise NotImplementedError(f"there is no JAX version of {run.case.name} on {device}")
        return build(run, _DTYPES[run.dtype])

    def wait(self, results: dict[str, Any]) -> None:
        jax.block_until_ready(results)

    @staticmethod
    def _differentiated(run: Run, loss: Callable[..., Any], names: tuple[str, ...], arguments: tuple[Any, ...]) -> Any:
        """A call of loss, with gradients of its first len(names) arguments if the phase wants them."""
        if run.phase == "forward":
            forward = jax.jit(loss)
            return lambda: {"loss": forward(*arguments)}
        both = jax.jit(jax.value_and_grad(loss, argnums=tuple(range(len(names)))))

        def call() -> dict[str, Any]:
            value, grads = both(*arguments)
            return {"loss": value, **dict(zip(names, grads, strict=True))}

        return call

    def _setup_cross_entropy(self, run: Run, dtype: Any) -> Any:
        N, V = run.case.sizes["N"], run.case.sizes["V"]
        variant = run.case.name.split("/")[2:]
        if variant not in ([], ["smoothing"]):
            raise NotImplementedError(f"there is no JAX version of {run.case.name}")
        g = torch.Generator().manual_seed(run.case.seed())
        logits = _to_jax(3 * torch.randn(N, V, generator=g), dtype)
        target = _to_jax(torch.randint(V, (N,), generator=g), jnp.int32)
        smoothing = 0.1 if variant else 0.0
        return self._differentiated(
            run,
            lambda logits, target: _cross_entropy(logits, target, smoothing),
            ("dlogits",),
            (logits, target),
        )

    def _setup_linear_cross_entropy(self, run: Run, dtype: Any) -> Any:
        N, H, V = (run.case.sizes[key] for key in "NHV")
        if "ignored" in run.case.name:
            raise NotImplementedError("JAX computes ignored rows like any other: see the case without them")
        g = torch.Generator().manual_seed(run.case.seed())
        x = _to_jax(torch.randn(N, H, generator=g), dtype)
        weight = _to_jax(torch.randn(V, H, generator=g) / H**0.5, dtype)
        target = _to_jax(torch.randint(V, (N,), generator=g), jnp.int32)
        return self._differentiated(
            run,
            lambda x, weight, target: _cross_entropy(x @ weight.T, target, 0.0),
            ("dx", "dweight"),
            (x, weight, target),
        )

    def _setup_rnn(self, run: Run, dtype: Any) -> Any:
        kind, *rest = run.case.name.split("/")
        if kind not in ("lstm", "gru", "rnn") or len(rest) != 1 or run.case.sizes["layers"] != 1:
            raise NotImplementedError(f"there is no JAX version of {run.case.name}")
        T, B, I, H = (run.case.sizes[key] for key in "TBIH")
        torch.manual_seed(run.case.seed())
        g = torch.Generator().manual_seed(run.case.seed())
        module = getattr(torch.nn, kind.upper())(I, H)
        weights = tuple(_to_jax(p, dtype) for p in module.parameters())
        x = _to_jax(torch.randn(T, B, I, generator=g), dtype)
        dy = _to_jax(torch.randn(T, B, H, generator=g), dtype)
        step = {"lstm": _lstm_step, "gru": _gru_step, "rnn": _rnn_step}[kind]

        def forward(x: Any, *weights: Any) -> Any:
            w_ih, w_hh, b_ih, b_hh = weights
            zeros = jnp.zeros((B, H), dtype)
            state = (zeros, zeros) if kind == "lstm" else zeros
            _, y = jax.lax.scan(lambda s, gx: step(s, gx, w_hh, b_hh), state, x @ w_ih.T + b_ih)
            return y

        if run.phase == "forward":
            call = jax.jit(forward)
            return lambda: {"y": call(x, *weights)}
        names = ["dx", *(f"d{name}" for name, _ in module.named_parameters())]

        @jax.jit
        def both(dy: Any, *arguments: Any) -> Any:
            y, pullback = jax.vjp(forward, *arguments)
            return y, pullback(dy)

        def call_both() -> dict[str, Any]:
            y, grads = both(dy, x, *weights)
            return {"y": y, **dict(zip(names, grads, strict=True))}

        return call_both

    def _setup_embedding(self, run: Run, dtype: Any) -> Any:
        if run.phase == "step" or "N" not in run.case.sizes:
            raise NotImplementedError(f"there is no JAX version of {run.case.name}")
        V, D, N = (run.case.sizes[key] for key in "VDN")
        g = torch.Generator().manual_seed(run.case.seed())
        torch.manual_seed(run.case.seed())
        table = _to_jax(torch.nn.Embedding(V, D).weight, dtype)
        kind = (run.case.name.split("/")[2:] or ["uniform"])[0]
        indices = _to_jax(indices_of(kind, V, N, g), jnp.int32)
        dout = _to_jax(torch.randn(N, D, generator=g), dtype)
        lookup = jax.jit(lambda table, indices: table[indices])
        if run.phase == "forward":
            return lambda: {"out": lookup(table, indices)}

        @jax.jit
        def both(table: Any, indices: Any, dout: Any) -> Any:
            out, pullback = jax.vjp(lambda table: table[indices], table)
            return out, pullback(dout)[0]

        def call() -> dict[str, Any]:
            out, dweight = both(table, indices, dout)
            return {"out": out, "dweight": dweight}

        return call


def _lstm_step(state: Any, gx: Any, w_hh: Any, b_hh: Any) -> Any:
    h, c = state
    i, f, g, o = jnp.split(gx + h @ w_hh.T + b_hh, 4, axis=-1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return (h, c), h


def _gru_step(h: Any, gx: Any, w_hh: Any, b_hh: Any) -> Any:
    xr, xz, xn = jnp.split(gx, 3, axis=-1)
    hr, hz, hn = jnp.split(h @ w_hh.T + b_hh, 3, axis=-1)
    r, z = jax.nn.sigmoid(xr + hr), jax.nn.sigmoid(xz + hz)
    h = (1 - z) * jnp.tanh(xn + r * hn) + z * h
    return h, h


def _rnn_step(h: Any, gx: Any, w_hh: Any, b_hh: Any) -> Any:
    h = jnp.tanh(gx + h @ w_hh.T + b_hh)
    return h, h
