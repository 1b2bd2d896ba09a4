"""What recurrent layers have in common; the classes are in ``rnn.py``.

Each class stands before torch's of the same name, which keeps parameters, initialisation, state_dict, representation
and checks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .. import dispatch
from .. import functional as F
from .._signature import FullSignature
from ..functional._rnn_options import Extras, checked_option
from ..functional.rnn import step
from ._admission import admit
from ._deploy import Deployable


class Layers(torch.nn.RNNBase, Deployable):
    """What the three have in common: states in, states out, packed, unbatched or neither."""

    _function: str
    # Whose forward refuses a malformed call.
    _torch_class: type[torch.nn.RNNBase]
    # Whether there is a c beside h.
    _pair = False
    _cells = 1  # the width of c, in hidden_size

    # What torch's layers do not have, with neutral values.
    _OPTIONS = Extras.of_a_module()
    # And those that weights have their shapes of.
    _SHAPING = ("peephole", "num_heads", "layer_norm")
    peephole: bool = False
    num_heads: int = 1
    layer_norm: bool = False
    # A class names its mode itself.
    __signature__ = FullSignature(given=("mode",))

    def __init__(
        self,
        *args: Any,
        clip: float = 0.0,
        zoneout: float | tuple[float, float] = 0.0,
        weight_dropout: float = 0.0,
        variational_dropout: bool = False,
        num_heads: int = 1,
        layer_norm: bool = False,
        checkpoint_chunks: int = 1,
        state_dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.clip, self.zoneout, self.weight_dropout = clip, zoneout, weight_dropout
        self.variational_dropout, self.num_heads, self.layer_norm = variational_dropout, num_heads, layer_norm
        self.checkpoint_chunks, self.state_dtype = checkpoint_chunks, state_dtype
        self._check_heads()
        if num_heads > 1 or self.peephole or layer_norm:
            self._add_parameters()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._OPTIONS or name in self._SHAPING:
            value = self._checked(name, value)
        super().__setattr__(name, value)

    def _checked(self, name: str, value: Any) -> Any:
        """An option as it is kept.

        Raises:
            ValueError: if it takes no such value, or is one that weights have their shapes of, and they have others.
        """
        before = self.__dict__.get(name, value)
        if name == "zoneout" and isinstance(value, tuple):
            if self._function != "lstm":
                raise ValueError(f"zoneout: got a pair, but {type(self).__name__} has one state; expected a number")
            checked: Any = tuple(checked_option(name, probability) for probability in value)
            if len(checked) != 2:
                raise ValueError(f"zoneout: got {value}, expected a number between 0 and 1, or two, for h and for c")
        else:
            checked = checked_option(name, value)
        if name in self._SHAPING and before != checked:
            raise ValueError(
                f"{name}: got {value}, expected {before}, for which there are weights; make another module"
            )
        return checked

    def _check_heads(self) -> None:
        heads = self.num_heads
        if self.hidden_size % heads or (heads > 1 and self.proj_size):
            raise ValueError(
                f"num_heads: got {heads} for hidden_size {self.hidden_size} and proj_size {self.proj_size}; expected a"
                " divisor of hidden_size, and no projection beside several heads"
            )

    def _directions(self) -> list[str]:
        """The endings of parameters' names, one for every layer and direction, in torch's order."""
        suffixes = ("", "_reverse")[: 1 + self.bidirectional]
        return [f"_l{layer}{suffix}" for layer in range(self.num_layers) for suffix in suffixes]

    def _add_parameters(self) -> None:
        H, (rows, columns) = self.hidden_size, self._parameters["weight_hh_l0"].shape  # type: ignore[union-attr]
        like: Tensor = self._parameters["weight_hh_l0"]  # type: ignore[assignment]
        shapes: dict[str, tuple[int, ...]] = {}
        if self.num_heads > 1:
            shapes["weight_hh"] = (rows, columns // self.num_heads)
        if self.peephole:
            shapes["weight_peephole"] = (3, H)
        shapes.update(dict.fromkeys(self._norms(), (rows,)))
        shapes.update({name: (H,) for name in self._norms() if name.endswith("_c")})
        for direction in self._directions():
            for name, shape in shapes.items():
                self.register_parameter(name + direction, torch.nn.Parameter(like.new_empty(shape)))
        self._init_flat_weights()
        self.reset_parameters()

    def _norms(self) -> tuple[str, ...]:
        if not self.layer_norm:
            return ()
        own = ("weight_norm_c", "bias_norm_c") if self._function == "lstm" else ()
        return ("weight_norm_ih", "weight_norm_hh", *own)

    def reset_parameters(self) -> None:
        """As torch's; what normalises begins as the identity."""
        super().reset_parameters()
        for name, parameter in self._parameters.items():
            if parameter is not None and "_norm_" in name:
                torch.nn.init.constant_(parameter, float(name.startswith("weight")))

    def _keywords(self) -> dict[str, Any]:
        """The options of ``functional`` that are in use."""
        used = {name: value for name, neutral in self._OPTIONS.items() if (value := getattr(self, name)) != neutral}
        if isinstance(self.zoneout, tuple):
            used["zoneout"], used["zoneout_cell"] = self.zoneout
        if self.peephole:
            used["peepholes"] = [getattr(self, f"weight_peephole{direction}") for direction in self._directions()]
        if self.layer_norm:
            norms = self._norms()
            used["norms"] = [[getattr(self, name + direction) for name in norms] for direction in self._directions()]
        return used

    def extra_repr(self) -> str:
        used = [f"{name}={getattr(self, name)}" for name in self._options_beyond_torch()]
        return ", ".join([super().extra_repr(), *used])

    def _options_beyond_torch(self) -> list[str]:
        neutral = {**{name: getattr(Layers, name) for name in self._SHAPING}, **self._OPTIONS}
        return [name for name, value in neutral.items() if getattr(self, name) != value]

    def _weights_have_changed(self) -> bool:
        """torch's answer in a fraction of its time: decoding asks in every step."""
        own, parameters = self.__dict__, self._parameters
        for ref, name in zip(self._flat_weight_refs, self._flat_weights_names, strict=True):
            weight = None if name in own else parameters.get(name)
            if weight is None:
                weight = self._computed(name)
            if weight is not None and ref is not None and ref() is not weight:
                return True
        return False

    def _computed(self, name: str) -> Any:
        """A weight that is parametrised, an attribute or missing. torch asks twice, which a power iteration counts."""
        try:
            getattr(self, name)
        except AttributeError:
            return None
        return getattr(self, name)

    def _weights(self) -> list[Any]:
        """The weights of every way through, by torch's rule: the parameters as they stand, if one of them is another
        object than at the last look; else ``_flat_weights``, which may have been set by hand."""
        if self._weights_have_changed():
            if torch.compiler.is_compiling():
                # What a trace computes must not outlive it in the module.
                return [self._computed(name) for name in self._flat_weights_names]
            self._init_flat_weights()
        return self._flat_weights

    def _forward(self, input: Any, hx: Any) -> tuple[Any, ...]:
        if dispatch.exporter() is not None and (forward := self._torch_forward()) and dispatch.exported(self._function):
            return forward(self, input, hx)
        weights = self._weights()
        short = hx is not None and not torch.compiler.is_compiling()
        if short and (result := self._step(input, hx, weights)) is not None:
            return result
        states = None if hx is None else self._as_tuple(hx)
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx, states, weights)
        tensors = (input, *(states or ()))
        if not all(isinstance(t, Tensor) and t.dim() == tensors[0].dim() and 1 < t.dim() < 4 for t in tensors):
            return self._refused(input, hx)
        batched, batch_dim = input.dim() == 3, 0 if self.batch_first else 1
        if not batched:
            input = input.unsqueeze(batch_dim)
            states = states and tuple(state.unsqueeze(1) for state in states)
        if states is None:
            states = self._zeros(input, input.size(batch_dim))
        self._check(input, states, None, weights)
        output, finals, cells = self._call(input, states, weights, self.batch_first)
        if not batched:
            output, finals = output.squeeze(batch_dim), tuple(state.squeeze(1) for state in finals)
            cells = tuple(c.squeeze(batch_dim) for c in cells)
        return output, self._as_given(finals), *cells

    def _check(self, input: Tensor, states: tuple[Tensor, ...], batch_sizes: Tensor | None, weights: list[Any]) -> None:
        """torch's checks, which look at ``_flat_weights``."""
        kept = self._flat_weights
        # Of lists the compiler of torch 2.10 cannot say whether they are the same.
        others = any(a is not b for a, b in zip(weights, kept, strict=False))
        if others:
            self._flat_weights = weights
        try:
            self.check_forward_args(input, self._as_given(states), batch_sizes)
        finally:
            if others:
                self._flat_weights = kept

    def _call(
        self,
        input: Tensor,
        states: tuple[Tensor, ...],
        weights: list[Any],
        *form: Any,
        batch_sizes: tuple[Tensor, ...] = (),
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """(output, final states, (cell states) if wanted) from either form of the functional."""
        if self.state_dtype is not None:
            states = tuple(state.to(self.state_dtype) for state in states)
        output, *rest = getattr(F, self._function)(
            input,
            *batch_sizes,
            self._as_given(states),
            weights,
            self.bias,
            self.num_layers,
            self.dropout,
            self.training,
            self.bidirectional,
            *form,
            **self._keywords(),
        )
        count = 1 + self._pair
        return output, tuple(rest[:count]), tuple(rest[count:])

    def _step(self, input: Any, hx: Any, weights: list[Any]) -> tuple[Any, Any] | None:
        """A single step of a single plain layer, if it may take the short way."""
        if self.num_layers != 1 or self.bidirectional or self.proj_size or type(input) is not Tensor:
            return None
        if self._cells > 1:
            return None
        if input.dim() != 3 or input.size(1 if self.batch_first else 0) != 1:
            return None
        states = self._as_tuple(hx)
        if self._added() or not all(isinstance(t, Tensor) for t in (*states, *weights)):
            return None
        if states[0].dim() != 3 or states[0].size(0) != 1 or len(weights) != (4 if self.bias else 2):
            return None
        new = step(self._function, input, states, *weights, *(() if self.bias else (None, None)))
        if new is None:
            return None
        # Not the same tensor twice: what is written into the output stays out of the state.
        y = torch.stack(new[0].unbind(0), 1) if self.batch_first else new[0].clone()
        return y, self._as_given(new)

    def _forward_packed(
        self, input: PackedSequence, hx: Any, states: tuple[Any, ...] | None, weights: list[Any]
    ) -> tuple[Any, ...]:
        data, batch_sizes, sorted_indices, unsorted_indices = input
        fits = _is_packed(data, batch_sizes) and data.shape[1] == self.input_size
        fits = fits and (data.dtype == weights[0].dtype or torch._C._is_any_autocast_enabled())
        if states is not None:
            given = [state for state in states if isinstance(state, Tensor) and state.dim() > 2]
            if self._pair and not all(map(self._has_layers, given)):
                # torch would read outside of memory. It has checks, which it makes for other inputs.
                self._check(data, states, batch_sizes, weights)
            fits = fits and (sorted_indices is None or sorted_indices.numel() == int(batch_sizes[0]))
            fits = fits and self._are_states(states, int(batch_sizes[0]))
        if not fits:
            return self._refused(input, hx)
        states = self._zeros(data, int(batch_sizes[0])) if states is None else self._permuted(states, sorted_indices)
        self._check(data, states, batch_sizes, weights)
        output, finals, cells = self._call(data, states, weights, batch_sizes=(batch_sizes,))

        def packed(data: Tensor) -> PackedSequence:
            return PackedSequence(data, batch_sizes, sorted_indices, unsorted_indices)

        return packed(output), self._as_given(self._permuted(finals, unsorted_indices)), *map(packed, cells)

    def _has_layers(self, state: Tensor) -> bool:
        return state.dim() == 3 and state.shape[0] == self.num_layers * (1 + self.bidirectional)

    def _are_states(self, states: tuple[Any, ...], batch: int) -> bool:
        shapes = ((batch, width) for width in (self.proj_size or self.hidden_size, self._cells * self.hidden_size))
        pairs = zip(states, shapes, strict=False)
        return all(isinstance(s, Tensor) and self._has_layers(s) and s.shape[1:] == shape for s, shape in pairs)

    def _refused(self, input: Any, hx: Any) -> tuple[Any, ...]:
        """What torch's class says to a malformed call; or what it computes, where it knows all that is asked for."""
        result = self._torch_class.forward(self, input, hx)
        if self._added():
            raise ValueError(f"{type(self).__name__}: input or states are malformed, which only torch's options allow")
        return result

    def _added(self) -> bool:
        """Whether this layer does what torch's does not."""
        return self.num_heads > 1 or bool(self._keywords())

    def _as_tuple(self, hx: Any) -> tuple[Any, ...]:
        """The states; what is no pair where it should be is ``(None,)``."""
        if not self._pair:
            return (hx,)
        return tuple(hx) if isinstance(hx, (tuple, list)) and len(hx) == 2 else (None,)

    def _as_given(self, states: tuple[Tensor, ...]) -> Any:
        return states if self._pair else states[0]

    @staticmethod
    def _permuted(states: tuple[Tensor, ...], permutation: Tensor | None) -> tuple[Tensor, ...]:
        return states if permutation is None else tuple(state.index_select(1, permutation) for state in states)

    def _zeros(self, like: Tensor, batch: int) -> tuple[Tensor, ...]:
        layers = self.num_layers * (2 if self.bidirectional else 1)
        dtype = self.state_dtype or like.dtype
        widths = (self.proj_size or self.hidden_size, self._cells * self.hidden_size)[: 1 + self._pair]
        return tuple(torch.zeros(layers, batch, width, dtype=dtype, device=like.device) for width in widths)


# A module that was pickled without an option has its neutral value.
for _name, _neutral in Layers._OPTIONS.items():
    setattr(Layers, _name, _neutral)


def _is_packed(data: Tensor, batch_sizes: Tensor) -> bool:
    """Whether sizes and rows agree; somebody may have put the sequence together."""
    if batch_sizes.dim() != 1 or batch_sizes.dtype != torch.int64 or not batch_sizes.is_contiguous() or data.dim() != 2:
        return False
    if torch.compiler.is_compiling():
        return True
    sizes = batch_sizes.tolist()
    return bool(sizes) and sizes[-1] > 0 and sum(sizes) == data.shape[0] and sizes == sorted(sizes, reverse=True)


admit(Layers)
