"""Graphs that are made to run elsewhere, where llmkern may not be: scripted, traced, exported, ONNX, torch.fx."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import llmkern
import llmkern.functional as F
import llmkern.nn as nn
from llmkern import dispatch

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")

IDS = torch.tensor([[1, 2, 0], [3, 4, 1]])
X, H = torch.linspace(-1, 1, 30).view(2, 3, 5), torch.linspace(-1, 1, 8).view(2, 4)
CLASSES = torch.tensor([1, 3])
STATE = torch.linspace(-1, 1, 12).view(1, 3, 4)
LENGTHS = torch.tensor([2, 1, 2])


class Packed(torch.nn.Module):
    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
        return torch.nn.utils.rnn.pad_packed_sequence(self.layer(packed)[0])[0]


class Model(torch.nn.Module):
    """Ours inside a user's module."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 5, padding_idx=0)
        self.layers = torch.nn.ModuleList([nn.LSTM(5, 4, 2, batch_first=True, dropout=dropout), nn.GRU(4, 4)])
        self.cell = nn.GRUCell(4, 4)
        self.out = nn.Sequential(nn.Dropout(dropout), nn.Linear(4, 5))

    def forward(self, ids: Tensor) -> Tensor:
        y = self.embedding(ids)
        for layer in self.layers:
            y, _ = layer(y)
        return self.out(self.cell(y[:, -1]))


class Weighted(torch.nn.Module):
    """A bag whose third argument is given."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(5, 4, mode=mode)

    def forward(self, ids: Tensor, weights: Tensor) -> Tensor:
        return self.bag(ids, None, weights)


class One(torch.nn.Module):
    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, a: Tensor) -> Any:
        return self.layer(a)


class Two(torch.nn.Module):
    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, a: Tensor, b: Tensor) -> Any:
        return self.layer(a, b)


class WithPair(torch.nn.Module):
    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, a: Tensor, b: tuple[Tensor, Tensor]) -> Any:
        return self.layer(a, b)


def _inside(layer: torch.nn.Module, args: tuple[Any, ...]) -> torch.nn.Module:
    return (One(layer) if len(args) == 1 else WithPair(layer) if isinstance(args[1], tuple) else Two(layer)).eval()


# What torch has too: TorchScript's part of it.
TORCHS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "Linear": (lambda: nn.Linear(5, 4), (X,)),
    "Embedding": (lambda: nn.Embedding(5, 4, padding_idx=0), (IDS,)),
    "Embedding, max_norm": (lambda: nn.Embedding(5, 4, max_norm=1.0), (IDS,)),
    "Embedding, row_grad": (lambda: nn.Embedding(5, 4, row_grad=True), (IDS,)),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(5, 4), (IDS,)),
    "EmbeddingBag, offsets": (
        lambda: nn.EmbeddingBag(5, 4, mode="max", include_last_offset=True),
        (IDS.view(-1), torch.tensor([0, 2, 6])),
    ),
    "EmbeddingBag, weights": (lambda: Weighted("sum"), (IDS, torch.rand(2, 3))),
    **{name: (lambda name=name: getattr(nn, name)((3, 5)), (X,)) for name in ("LayerNorm", "RMSNorm")},
    "Dropout": (lambda: nn.Dropout(0.5), (X,)),
    "MSELoss": (lambda: nn.MSELoss(), (X, X + 1)),
    "CrossEntropyLoss": (lambda: nn.CrossEntropyLoss(label_smoothing=0.1), (H, CLASSES)),
    "NLLLoss": (lambda: nn.NLLLoss(), (H, CLASSES)),
    "RNN": (lambda: nn.RNN(5, 4, nonlinearity="relu"), (X,)),
    "GRU": (lambda: nn.GRU(5, 4, 2, batch_first=True, bidirectional=True, bias=False), (X,)),
    "GRU, state": (lambda: nn.GRU(5, 4), (X, STATE)),
    "GRU, unbatched": (lambda: nn.GRU(5, 4), (X[0],)),
    "LSTM": (lambda: nn.LSTM(5, 4, 2, bidirectional=True), (X,)),
    "LSTM, states": (lambda: nn.LSTM(5, 4), (X, (STATE, -STATE))),
    "LSTM, proj_size": (lambda: nn.LSTM(5, 4, proj_size=2), (X,)),
    "LSTM, packed": (lambda: Packed(nn.LSTM(5, 4)), (X, LENGTHS)),
    "RNNCell": (lambda: nn.RNNCell(5, 4), (X[0],)),
    "GRUCell": (lambda: nn.GRUCell(5, 4), (X[0], STATE[0])),
    "LSTMCell": (lambda: nn.LSTMCell(5, 4), (X[0], (STATE[0], -STATE[0]))),
    "LSTMCell, unbatched": (lambda: nn.LSTMCell(5, 4), (X[0, 0],)),
    "a model": (Model, (IDS,)),
}
# What TorchScript cannot compile: of ours alone, and the class whose options torch itself cannot.
OURS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "EmbeddingBag, weighted mean": (lambda: Weighted("mean"), (IDS, torch.rand(2, 3))),
    "FusedEmbedding": (lambda: nn.FusedEmbedding(5, 4, norm="layer", num_positions=4, num_token_types=2), (IDS,)),
    "QuantizedEmbedding": (lambda: llmkern.quantize_embedding(torch.rand(5, 7), 4), (IDS,)),
    "CrossEntropyLoss, z_loss": (lambda: nn.CrossEntropyLoss(z_loss=0.1, softcap=3.0), (H, CLASSES)),
    "LinearCrossEntropyLoss": (lambda: nn.LinearCrossEntropyLoss(4, 6), (H, CLASSES)),
    "LinearCrossEntropyLoss, z_loss": (lambda: nn.LinearCrossEntropyLoss(4, 6, z_loss=0.1), (H, CLASSES)),
    "RNN, checkpoint_chunks": (lambda: nn.RNN(5, 4, checkpoint_chunks=2, clip=0.5), (X,)),
    "GRU, layer_norm": (lambda: nn.GRU(5, 4, 2, layer_norm=True, num_heads=2, bidirectional=True), (X,)),
    "LSTM, peephole": (lambda: nn.LSTM(5, 4, peephole=True, forget_bias=1.0, return_cell_states=True), (X,)),
    "sLSTM": (lambda: nn.sLSTM(5, 4), (X,)),
}
EVERY = TORCHS | OURS


def _equal(got: Any, want: Any) -> None:
    torch.testing.assert_close(tree_leaves(got), tree_leaves(want), rtol=1e-5, atol=1e-6)


def _targets(program: Any) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def test_every_class_is_tried() -> None:
    classes = {name for name in nn.__all__ if isinstance(getattr(nn, name), type)}
    assert classes == {name.split(",")[0] for name in EVERY if "model" not in name}


@pytest.mark.parametrize("name", TORCHS)
def test_a_scripted_layer_is_torchs_with_our_parameters(name: str) -> None:
    build, args = TORCHS[name]
    layer = build()
    want = layer.eval()(*args)
    names, scripted = dict(layer.named_parameters()), torch.jit.script(_inside(layer, args))
    _equal(scripted(*args), want)
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    assert "llmkern::" not in str(scripted.inlined_graph)
    for key, parameter in scripted.named_parameters():
        assert parameter is names[key.removeprefix("layer.")]


@pytest.mark.parametrize("name", [name for name in OURS if "Bag" not in name and name != "LinearCrossEntropyLoss"])
def test_scripting_what_torch_has_not_says_what(name: str) -> None:
    build, args = OURS[name]
    with pytest.raises(NotImplementedError, match=rf"^torch.jit.script: got {name.split(',')[0]}.*use torch.jit.trace"):
        torch.jit.script(_inside(build(), args))


def test_scripting_a_subclass_takes_what_it_adds() -> None:
    class Ones(nn.Embedding):
        scale: float = 2.0

        def reset_parameters(self) -> None:
            torch.nn.init.ones_(self.weight)

    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return torch.nn.functional.linear(input, self.weight, self.bias) * 2

    assert torch.equal(torch.jit.script(Ones(5, 4))(IDS), torch.ones(2, 3, 4))
    doubled = Doubled(5, 4)
    _equal(torch.jit.script(doubled)(X), doubled(X))


@pytest.mark.parametrize("name", EVERY)
def test_a_traced_layer_holds_torchs_functions_and_their_gradients(name: str) -> None:
    build, args = EVERY[name]
    layer = build()
    if name == "Dropout":
        layer.eval()
    traced = torch.jit.trace(layer, args, check_trace=False)
    graph = str(traced.inlined_graph)
    assert "llmkern::" not in graph
    assert "PythonOp" not in graph
    file = io.BytesIO()
    torch.jit.save(traced, file)
    got, want = traced(*args), layer(*args)
    _equal(got, want)
    if parameters := list(layer.parameters()):
        sums = [sum(t.double().sin().sum() for t in tree_leaves(out)) for out in (got, want)]
        for ours, theirs in zip(*(torch.autograd.grad(s, parameters) for s in sums), strict=True):
            ours, theirs = (g.to_dense() if g.is_sparse else g for g in (ours, theirs))
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "input"),
    [
        (nn.Dropout(0.5), torch.ones(8, 8)),
        (nn.LSTM(5, 4, 2, dropout=0.5), X),
        (nn.FusedEmbedding(5, 64, dropout=0.5), IDS),
        (Model(0.5), IDS),
    ],
    ids=["Dropout", "between layers", "FusedEmbedding", "a model"],
)
def test_a_trace_draws_its_masks_anew(layer: torch.nn.Module, input: Tensor) -> None:
    traced = torch.jit.trace(layer, (input,), check_trace=False)
    first, second = (tree_leaves(traced(input))[0] for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", ["GRU, layer_norm", "sLSTM", "LSTM", "CrossEntropyLoss, z_loss", "FusedEmbedding"])
def test_a_trace_serves_other_batches(name: str) -> None:
    build, args = EVERY[name]
    layer = build()
    traced = torch.jit.trace(layer, args, check_trace=False)
    axis = 1 if args[0] is X else 0
    other = tuple(torch.cat([arg, arg.flip(axis)], axis) for arg in args)
    _equal(traced(*other), layer(*other))


def test_a_trace_of_our_own_steps_refuses_other_lengths() -> None:
    traced = torch.jit.trace(nn.sLSTM(5, 4), (X,), check_trace=False)
    for length in (1, 3):
        with pytest.raises(RuntimeError):
            traced(torch.zeros(length, 3, 5))


STRICTLY = ("Embedding", "GRU, state", "RNN, checkpoint_chunks")


@pytest.mark.parametrize(
    ("name", "strict"),
    [*((name, False) for name in EVERY if "packed" not in name), *((name, True) for name in STRICTLY)],
)
def test_an_exported_program_holds_no_op_of_ours(name: str, strict: bool) -> None:
    build, args = EVERY[name]
    layer = build().eval()
    program = torch.export.export(layer, args, strict=strict)
    assert not [target for target in _targets(program) if "llmkern" in target]
    _equal(program.module()(*args), layer(*args))


@pytest.mark.parametrize("name", ["GRU, layer_norm", "LSTM", "CrossEntropyLoss, z_loss"])
def test_an_exported_program_serves_other_batches(name: str) -> None:
    build, args = EVERY[name]
    layer, axis = build().eval(), 1 if args[0] is X else 0
    dynamic = tuple({axis: torch.export.Dim("batch")} for _ in args)
    program = torch.export.export(layer, args, dynamic_shapes=dynamic, strict=False)
    other = tuple(torch.cat([arg, arg.flip(axis)], axis) for arg in args)
    _equal(program.module()(*other), layer(*other))


def test_a_forced_backend_keeps_our_ops_in_an_exported_program() -> None:
    assert dispatch.unavailable("native") is None
    layer = nn.GRU(5, 4).eval()
    with llmkern.backend("native"):
        program = torch.export.export(layer, (X,), strict=False)
    assert "llmkern.rnn_forward.default" in _targets(program)
    _equal(program.module()(X), layer(X))


def test_compiled_code_keeps_our_ops() -> None:
    assert dispatch.unavailable("native") is None
    targets: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        targets.extend(_targets(graph))
        return graph

    layer = nn.GRU(5, 4).requires_grad_(False)
    _equal(torch.compile(layer, backend=backend, fullgraph=True)(X), layer(X))
    assert "llmkern.rnn_forward.default" in targets


@pytest.mark.parametrize("layer", [nn.GRU(5, 4), nn.GRUCell(5, 4), nn.sLSTM(5, 4)], ids=lambda m: type(m).__name__)
def test_explain_says_why_torch_serves_a_graph(layer: torch.nn.Module) -> None:
    input = X[0] if isinstance(layer, nn.GRUCell) else X
    (choice, *_) = llmkern.explain(lambda: torch.jit.trace(layer, (input,), check_trace=False)).choices
    assert choice.backend == ("reference" if isinstance(layer, nn.sLSTM) else "torch")
    assert "torch.jit.trace makes a graph to run elsewhere" in str(choice)
    (choice, *_) = llmkern.explain(lambda: torch.export.export(layer, (input,), strict=False)).choices
    assert "torch.export makes a graph to run elsewhere" in str(choice)


def test_layers_are_leaves_of_a_symbolic_trace() -> None:
    model = Model().eval()
    traced = torch.fx.symbolic_trace(model)
    leaves = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert leaves == ["embedding", "layers.0", "layers.1", "cell", "out.0", "out.1"]
    _equal(traced(IDS), model(IDS))
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert [n.target for n in torch.fx.symbolic_trace(again).graph.nodes if n.op == "call_module"] == leaves


def test_hooks_of_a_leaf_run_once() -> None:
    layer = nn.Linear(5, 4)
    layer.register_forward_hook(lambda module, args, output: output * 2)
    _equal(torch.fx.symbolic_trace(torch.nn.Sequential(layer))(X), layer(X))


def test_a_subclass_is_no_leaf() -> None:
    class Mine(nn.Dropout):
        def forward(self, input: Tensor) -> Tensor:
            return input * 2

    assert not torch.fx.Tracer().is_leaf_module(Mine(), "")
    assert torch.fx.Tracer().is_leaf_module(nn.Dropout(), "")
    assert type(nn.Dropout()).__module__ == "llmkern.nn.dropout"


def test_onnx_by_tracing(tmp_path: Path) -> None:
    torch.onnx.export(Model().eval(), (IDS,), tmp_path / "model.onnx", dynamo=False)
    content = (tmp_path / "model.onnx").read_bytes()
    assert (content.count(b"LSTM") >= 2, content.count(b"GRU") >= 1) == (True, True)


def test_onnx_by_export() -> None:
    pytest.importorskip("onnxscript")
    program = torch.onnx.export(Model().eval(), (IDS,), dynamo=True, verbose=False)
    assert program is not None
    operators = {node.op_type for node in program.model.graph}
    assert {"LSTM", "GRU", "Gemm"} <= operators
    assert {node.domain for node in program.model.graph} == {""}


ELSEWHERE = """
import sys
sys.modules["llmkern"] = None
import torch
model, ids, want = torch.load("inputs.pt", weights_only=True)
for name in ("scripted", "traced"):
    torch.testing.assert_close(torch.jit.load(f"{name}.pt")(ids), want)
torch.testing.assert_close(torch.export.load("exported.pt2").module()(ids), want)
print("right")
"""


def test_what_was_made_runs_where_llmkern_is_not(tmp_path: Path) -> None:
    model = Model().eval()
    torch.save((0, IDS, model(IDS).detach()), tmp_path / "inputs.pt")
    torch.export.save(torch.export.export(model, (IDS,), strict=False), tmp_path / "exported.pt2")
    torch.jit.save(torch.jit.trace(model, (IDS,)), tmp_path / "traced.pt")
    torch.jit.save(torch.jit.script(model), tmp_path / "scripted.pt")
    done = subprocess.run([sys.executable, "-c", ELSEWHERE], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.stdout == "right\n", done.stderr


def test_functions_called_by_a_users_module_leave_too() -> None:
    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.rand(6, 5))

        def forward(self, x: Tensor, target: Tensor) -> Tensor:
            return F.cross_entropy(F.linear(x, self.weight), target)

    model, args = Loss(), (X.reshape(6, 5), torch.arange(6))
    traced, program = torch.jit.trace(model, args), torch.export.export(model, args, strict=False)
    assert "llmkern::" not in str(traced.inlined_graph)
    assert not [target for target in _targets(program) if "llmkern" in target]
    for made in (traced, program.module()):
        _equal(made(*args), model(*args))


def test_functions_are_leaves_of_a_symbolic_trace_as_torchs() -> None:
    class Losses(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
            logits = F.linear(F.dropout(x, 0.5, False), weight)
            return F.cross_entropy(logits, target) + F.mse_loss(logits, logits * 2)

    traced = torch.fx.symbolic_trace(Losses())
    functions = [n.target for n in traced.graph.nodes if n.op == "call_function"]
    theirs = torch.nn.functional
    assert {theirs.linear, theirs.dropout, theirs.cross_entropy, theirs.mse_loss} <= set(functions)
    args = X.reshape(6, 5), torch.ones(4, 5), torch.tensor([0, 1, 2, 3, 0, 1])
    _equal(traced(*args), Losses()(*args))
