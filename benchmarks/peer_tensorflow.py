"""TensorFlow and Keras on the CPU: losses, lookup, bags, and Keras's recurrent layers, each under ``tf.function``."""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
import torch

from . import (
    bench_cross_entropy,
    bench_embedding,
    bench_embedding_bag,
    bench_linear_cross_entropy,
    bench_mse_loss,
    bench_rnn,
)
from .peers import AbsentError, Rewritten
from .suite import Call, Place, Run, namespace

# torch's gates in Keras's order.
ORDER = {"LSTM": (0, 1, 2, 3), "GRU": (1, 0, 2), "RNN": (0,)}


def to_tf(tensor: torch.Tensor) -> Any:
    tensor = tensor.detach()
    if not tensor.is_floating_point():
        return tf.constant(tensor.numpy())
    dtype = {torch.bfloat16: tf.bfloat16, torch.float16: tf.float16}.get(tensor.dtype, tf.float32)
    return tf.cast(tf.constant(tensor.float().numpy()), dtype)


def called(
    run: Run,
    function: Callable[..., Any],
    out: str,
    arguments: dict[str, Any],
    fixed: tuple[Any, ...],
    dout: Any = None,
) -> Call:
    """A call of function(*arguments, *fixed), and in training its gradients for dout."""
    values = tuple(arguments.values())
    if run.phase == "forward":
        forward = tf.function(function)
        return lambda: {out: forward(*values, *fixed)}

    @tf.function
    def both(values: Any, fixed: Any, dout: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(values)
            value = function(*values, *fixed)
        # A lookup's gradient is sparse; the others' are dense.
        grads = tape.gradient(value, values, dout)
        return value, [tf.convert_to_tensor(grad) for grad in grads]

    def call() -> dict[str, Any]:
        value, grads = both(values, fixed, dout)
        return {out: value, **dict(zip(arguments, grads, strict=True))}

    return call


def cross_entropy(logits: Any, target: Any) -> Any:
    """The mean over the rows that are not ignored; target (N) or (N, V)."""
    if len(target.shape) == 2:
        return tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits(target, logits))
    valid = target >= 0
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.maximum(target, 0), logits)
    return tf.reduce_sum(tf.where(valid, losses, 0)) / tf.reduce_sum(tf.cast(valid, losses.dtype))


class Peer(Rewritten):
    compiles = True
    library = "TensorFlow"

    def _cross_entropy(self, run: Run, place: Place) -> Call:
        logits, target, options = bench_cross_entropy.draw(run.case.sizes, place)
        if options:
            raise AbsentError("measured without smoothing and weights")
        return called(run, cross_entropy, "loss", {"dlogits": to_tf(logits)}, (to_tf(target),))

    def _linear_cross_entropy(self, run: Run, place: Place) -> Call:
        x, weight, target = map(to_tf, bench_linear_cross_entropy.draw(run.case.sizes, place))

        def loss(x: Any, weight: Any, target: Any) -> Any:
            return cross_entropy(tf.matmul(x, weight, transpose_b=True), target)

        return called(run, loss, "loss", {"dx": x, "dweight": weight}, (target,))

    def _mse_loss(self, run: Run, place: Place) -> Call:
        x, target = map(to_tf, bench_mse_loss.draw(run.case.sizes, place))
        loss = lambda x, target: tf.reduce_mean(tf.math.squared_difference(x, target))  # noqa: E731
        return called(run, loss, "loss", {"dx": x}, (target,))

    def _embedding(self, run: Run, place: Place) -> Call:
        module, indices, dout = bench_embedding.draw(namespace("torch"), run.case.sizes, place)
        return called(run, tf.gather, "out", {"dweight": to_tf(module.weight)}, (to_tf(indices),), to_tf(dout))

    def _embedding_bag(self, run: Run, place: Place) -> Call:
        module, indices, dout = bench_embedding_bag.draw(namespace("torch"), run.case.sizes, place)
        reduce = getattr(tf, f"reduce_{run.case.sizes['mode']}")
        bag = lambda table, rows: reduce(tf.gather(table, rows), axis=1)  # noqa: E731
        return called(run, bag, "out", {"dweight": to_tf(module.weight)}, (to_tf(indices),), to_tf(dout))

    def _rnn(self, run: Run, place: Place) -> Call:
        sizes = run.case.sizes
        kind = sizes["kind"]
        if sizes["variant"] or run.dtype != "fp32":
            raise AbsentError("Keras is measured on dense fp32 sequences in one direction")
        module, x, dy = bench_rnn.draw(namespace("torch"), sizes, place)
        named = {name: p.detach() for name, p in module.named_parameters()}
        layers = []
        for k in range(sizes["layers"]):
            layer = getattr(keras.layers, {"RNN": "SimpleRNN"}.get(kind, kind))(sizes["H"], return_sequences=True)
            layer.build((sizes["B"], sizes["T"], sizes["I"] if k == 0 else sizes["H"]))
            layer.set_weights(_keras_weights(kind, named, k))
            layers.append(layer)

        def forward(x: Any) -> Any:
            for layer in layers:
                x = layer(x)
            return x

        # Keras has the batch first; the numbers are compared with the time first.
        inputs, dout = to_tf(x.transpose(0, 1)), to_tf(dy.transpose(0, 1))
        call = _trained(forward, layers, inputs, dout, run.phase != "forward")
        return lambda: _time_first(call())


def _keras_weights(kind: str, named: dict[str, torch.Tensor], k: int) -> list[Any]:
    def of(name: str) -> torch.Tensor:
        gates = named[f"{name}_l{k}"].unflatten(0, (len(ORDER[kind]), -1))
        return gates[list(ORDER[kind])].flatten(0, 1)

    bias_ih, bias_hh = of("bias_ih"), of("bias_hh")
    bias = torch.stack([bias_ih, bias_hh]) if kind == "GRU" else bias_ih + bias_hh
    return [of("weight_ih").T.numpy(), of("weight_hh").T.numpy(), bias.numpy()]


def _trained(forward: Callable[[Any], Any], layers: list[Any], x: Any, dout: Any, train: bool) -> Call:
    if not train:
        compiled = tf.function(forward)
        return lambda: {"y": compiled(x)}
    variables = [variable.value for layer in layers for variable in layer.trainable_variables]

    @tf.function
    def both(x: Any, dout: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = forward(x)
        return y, tape.gradient(y, [x, *variables], dout)

    def call() -> dict[str, Any]:
        y, grads = both(x, dout)
        # The parameters' gradients are computed, but in Keras's own layout: y and dx stand for them.
        return {"y": y, "dx": grads[0]}

    return call


def _time_first(results: dict[str, Any]) -> dict[str, Any]:
    return {name: _Transposed(value) for name, value in results.items()}


class _Transposed:
    """A (B, T, H) result that becomes (T, B, H) only when it is read, outside the clock."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return self.value.numpy().swapaxes(0, 1)
