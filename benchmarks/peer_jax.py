"""JAX on the CPU: the strongest peer for whole steps and linear + cross-entropy.

Each case once more in JAX, on the inputs that the torch version draws, so that results compare. What does not change
from call to call is compiled once; optimizers give the old buffers back (donation), as a JAX training loop does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import torch

from . import (
    bench_cross_entropy,
    bench_embedding,
    bench_embedding_bag,
    bench_linear,
    bench_linear_cross_entropy,
    bench_model,
    bench_mse_loss,
    bench_optim,
    peer_jax_rnn,
)
from .peers import AbsentError, Rewritten
from .suite import Call, Place, Run, namespace


def to_jax(tensor: torch.Tensor) -> jax.Array:
    tensor = tensor.detach()
    if not tensor.is_floating_point():
        return jnp.asarray(tensor.numpy(), jnp.int32)
    # numpy has no bf16: through fp32 and back, which is exact.
    dtype = {torch.bfloat16: jnp.bfloat16, torch.float16: jnp.float16}.get(tensor.dtype, jnp.float32)
    return jnp.asarray(tensor.float().numpy(), dtype)


def differentiated(run: Run, function: Callable[..., Any], names: tuple[str, ...], arguments: tuple[Any, ...]) -> Call:
    """A call of a loss, with the gradients of its first arguments, as many as names, if the phase wants them."""
    if run.phase == "forward":
        forward = jax.jit(function)
        return lambda: {"loss": forward(*arguments)}
    both = jax.jit(jax.value_and_grad(function, argnums=tuple(range(len(names)))))

    def call() -> dict[str, Any]:
        value, grads = both(*arguments)
        return {"loss": value, **dict(zip(names, grads, strict=True))}

    return call


def pulled_back(
    run: Run,
    function: Callable[..., Any],
    out: str,
    arguments: dict[str, Any],
    fixed: tuple[Any, ...],
    dout: Any,
) -> Call:
    """A call of function(*arguments, *fixed), with its pullback of dout to the arguments if the phase wants it. Nothing
    is closed over: XLA would compute with it at compile time."""
    values = tuple(arguments.values())
    if run.phase == "forward":
        forward = jax.jit(function)
        return lambda: {out: forward(*values, *fixed)}

    @jax.jit
    def both(dout: Any, values: Any, fixed: Any) -> Any:
        value, pullback = jax.vjp(lambda *values: function(*values, *fixed), *values)
        return value, pullback(dout)

    def call() -> dict[str, Any]:
        value, grads = both(dout, values, fixed)
        return {out: value, **dict(zip(arguments, grads, strict=True))}

    return call


def cross_entropy(logits: Any, target: Any, smoothing: float = 0.0, weight: Any = None) -> Any:
    """The mean over the rows that are not ignored, in fp32, as torch defines it; target (N) or (N, V)."""
    logits = logits.astype(jnp.float32)
    if target.ndim == 2:
        return -(target.astype(jnp.float32) * jax.nn.log_softmax(logits)).sum(-1).mean()
    lse = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, jnp.maximum(target, 0)[:, None], axis=-1)[:, 0]
    losses = lse - (1 - smoothing) * picked - smoothing * logits.mean(-1) if smoothing else lse - picked
    weights = (target >= 0).astype(jnp.float32)
    if weight is not None:
        weights *= weight.astype(jnp.float32)[jnp.maximum(target, 0)]
    return (losses * weights).sum() / weights.sum()


def adam(t: Any, p: Any, g: Any, m: Any, v: Any) -> tuple[Any, Any, Any]:
    """One step of torch's Adam with its defaults and lr 1e-3."""
    g = g.astype(jnp.float32)
    m32 = 0.9 * m.astype(jnp.float32) + 0.1 * g
    v32 = 0.999 * v.astype(jnp.float32) + 0.001 * g * g
    step = 1e-3 / (1 - 0.9**t) * m32 / (jnp.sqrt(v32 / (1 - 0.999**t)) + 1e-8)
    return (p.astype(jnp.float32) - step).astype(p.dtype), m32.astype(m.dtype), v32.astype(v.dtype)


def adam_all(t: Any, params: Any, grads: Any, ms: Any, vs: Any) -> tuple[Any, Any, Any]:
    stepped = jax.tree.map(lambda p, g, m, v: adam(t, p, g, m, v), params, grads, ms, vs)
    pick = lambda i: jax.tree.map(lambda s: s[i], stepped, is_leaf=lambda s: isinstance(s, tuple))  # noqa: E731
    return pick(0), pick(1), pick(2)


class Peer(Rewritten):
    compiles = True
    library = "JAX"

    def wait(self, results: dict[str, Any]) -> None:
        jax.block_until_ready(results)

    def _cross_entropy(self, run: Run, place: Place) -> Call:
        logits, target, options = bench_cross_entropy.draw(run.case.sizes, place)
        smoothing = options.get("label_smoothing", 0.0)
        weight = to_jax(options["weight"]) if "weight" in options else None
        loss = lambda logits, target, weight: cross_entropy(logits, target, smoothing, weight)  # noqa: E731
        return differentiated(run, loss, ("dlogits",), (to_jax(logits), to_jax(target), weight))

    def _linear_cross_entropy(self, run: Run, place: Place) -> Call:
        x, weight, target = map(to_jax, bench_linear_cross_entropy.draw(run.case.sizes, place))
        loss = lambda x, weight, target: cross_entropy(x @ weight.T, target)  # noqa: E731
        return differentiated(run, loss, ("dx", "dweight"), (x, weight, target))

    def _linear(self, run: Run, place: Place) -> Call:
        x, weight, bias, dy = map(to_jax, bench_linear.draw(run.case.sizes, place))
        layer = lambda x, weight, bias: x @ weight.T + bias  # noqa: E731
        return pulled_back(run, layer, "y", {"dx": x, "dweight": weight, "dbias": bias}, (), dy)

    def _mse_loss(self, run: Run, place: Place) -> Call:
        x, target = map(to_jax, bench_mse_loss.draw(run.case.sizes, place))
        loss = lambda x, target: jnp.square((x - target).astype(jnp.float32)).mean()  # noqa: E731
        return differentiated(run, loss, ("dx",), (x, target))

    def _embedding(self, run: Run, place: Place) -> Call:
        module, indices, dout = bench_embedding.draw(namespace("torch"), run.case.sizes, place)
        lookup = lambda table, rows: table[rows]  # noqa: E731
        return pulled_back(run, lookup, "out", {"dweight": to_jax(module.weight)}, (to_jax(indices),), to_jax(dout))

    def _embedding_bag(self, run: Run, place: Place) -> Call:
        module, indices, dout = bench_embedding_bag.draw(namespace("torch"), run.case.sizes, place)
        reduce = getattr(jnp, run.case.sizes["mode"])
        bag = lambda table, rows: reduce(table[rows], axis=1)  # noqa: E731
        return pulled_back(run, bag, "out", {"dweight": to_jax(module.weight)}, (to_jax(indices),), to_jax(dout))

    def _embedding_step(self, run: Run, place: Place) -> Call:
        if run.case.sizes["sparse"]:
            raise AbsentError("JAX has no SparseAdam")
        module, indices, dout = bench_embedding.draw(namespace("torch"), run.case.sizes, place)

        def step(table: Any, m: Any, v: Any, t: Any, rows: Any, dout: Any) -> Any:
            _, pullback = jax.vjp(lambda table: table[rows], table)
            return adam(t, table, pullback(dout)[0], m, v)

        return _looped(step, to_jax(module.weight), (to_jax(indices), to_jax(dout)), lambda weight: {"weight": weight})

    def _optim(self, run: Run, place: Place) -> Call:
        if run.case.sizes["optimizer"] != "Adam":
            raise AbsentError("measured with Adam only")
        parameters = bench_optim.draw(run.case.sizes["shapes"], place)
        grads = [to_jax(p.grad) for p in parameters if p.grad is not None]

        def step(params: Any, ms: Any, vs: Any, t: Any, grads: Any) -> Any:
            return adam_all(t, params, grads, ms, vs)

        named = lambda params: {str(i): p for i, p in enumerate(params)}  # noqa: E731
        return _looped(step, [to_jax(p) for p in parameters], (grads,), named)

    def _model(self, run: Run, place: Place) -> Call:
        model, tokens = bench_model.draw(namespace("torch"), run.case.sizes, place)
        params = {name: to_jax(p) for name, p in model.named_parameters()}
        layers = len(run.case.sizes["hidden"])

        def loss(params: Any, words: Any) -> Any:
            x = params["embedding.weight"][words[:-1]]
            for k in range(layers):
                weights = [params[f"lstms.{k}.{name}_l0"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
                x = peer_jax_rnn.layer("LSTM", x, *weights)
            logits = x @ params["linear.weight"].T + params["linear.bias"]
            return cross_entropy(logits.reshape(-1, logits.shape[-1]), words[1:].reshape(-1))

        def step(params: Any, ms: Any, vs: Any, t: Any, words: Any) -> Any:
            value, grads = jax.value_and_grad(loss)(params, words)
            return (*adam_all(t, params, grads, ms, vs), value)

        return _looped(step, params, (to_jax(tokens),), lambda params: params)

    def _rnn(self, run: Run, place: Place) -> Call:
        return peer_jax_rnn.sequence(run, place)

    def _rnn_steps(self, run: Run, place: Place) -> Call:
        return peer_jax_rnn.steps(run, place)


def _looped(
    step: Callable[..., Any], params: Any, fixed: tuple[Any, ...], named: Callable[[Any], dict[str, Any]]
) -> Call:
    """A call that steps the parameters and Adam's states on, in place."""
    stepped = jax.jit(step, donate_argnums=(0, 1, 2))
    state = [params, *(jax.tree.map(jnp.zeros_like, params) for _ in range(2))]
    count = 0

    def call() -> dict[str, Any]:
        nonlocal count
        count += 1
        new, m, v, *loss = stepped(*state, jnp.float32(count), *fixed)
        state[:] = new, m, v
        return {**named(new), **({"loss": loss[0]} if loss else {})}

    return call
