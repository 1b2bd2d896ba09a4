"""Tables with row gradients and everybody who may see their memory: reads, aliases, wrappers."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.utils.prune
from row_tables import D, Pair, V, batches, embedding
from torch import Tensor

import llmkern
from llmkern import optim
from llmkern.nn import Embedding
from llmkern.ops import RowParameter

ALL = torch.arange(V)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


def set_to(p: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.zeros(1).set_(p)


def saved(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@torch.jit.script
def scripted(weight: Tensor) -> Tensor:
    return weight * 1


@torch.jit.script
def scripted_lookup(weight: Tensor, indices: Tensor) -> Tensor:
    return torch.embedding(weight, indices)


READS: dict[str, Callable[[Any], Any]] = {
    "torch.tensor": lambda m: torch.tensor(m.weight),
    "as_tensor": lambda m: torch.as_tensor(m.weight, dtype=torch.float64).float(),
    "asarray": lambda m: torch.asarray(m.weight, copy=True),
    "numpy": lambda m: torch.from_numpy(np.asarray(m.weight.detach())),
    "numpy by force": lambda m: torch.from_numpy(m.weight.numpy(force=True)),
    "tolist": lambda m: torch.tensor(m.weight.tolist()),
    "dlpack": lambda m: torch.from_dlpack(m.requires_grad_(False).weight),
    "storage": lambda m: torch.tensor(m.weight.storage().tolist()),
    "untyped storage": lambda m: torch.frombuffer(bytearray(m.weight.untyped_storage()), dtype=torch.float32),
    "set_": lambda m: set_to(m.weight),
    "as_subclass": lambda m: m.weight.as_subclass(torch.Tensor),
    "iteration": lambda m: torch.stack(list(m.weight)),
    "views": lambda m: torch.cat(m.weight.chunk(3)),
    "inference": lambda m: torch.inference_mode()(lambda: m.weight * 1)(),
    "inference lookup": lambda m: torch.inference_mode()(m)(ALL),
    "functional_call": lambda m: torch.func.functional_call(m, dict(m.named_parameters()), (ALL,)),
    "func.grad": lambda m: torch.func.grad(lambda w: (w * w).sum() / 2)(m.weight),
    "func.vmap": lambda m: torch.func.vmap(lambda row: row * 1)(m.weight),
    "vmap of lookups": lambda m: torch.func.vmap(m)(ALL),
    "jvp": lambda m: torch.func.jvp(lambda w: w * w / 2, (m.weight,), (torch.ones(V, D),))[1],
    "script": lambda m: scripted(m.weight),
    "scripted lookup": lambda m: scripted_lookup(m.weight, ALL),
    "trace": lambda m: torch.jit.trace(m, ALL)(ALL),
    "bag": lambda m: torch.nn.functional.embedding_bag(ALL[:, None], m.weight),
    "our bag": lambda m: llmkern.nn.functional.embedding_bag(ALL[:, None], m.weight),
    "max_norm": lambda m: torch.nn.functional.embedding(ALL, m.weight, max_norm=1e9),
    "compiled": lambda m: torch.compile(lambda w: w * 1, backend="eager")(m.weight),
    "save": lambda m: saved(dict(m.named_parameters()))["weight"],
    "copy": lambda m: copy.copy(m.weight),
    "double": lambda m: copy.deepcopy(m).double().weight.float(),
    "from_pretrained": lambda m: type(m).from_pretrained(m.weight).weight,
    "Parameter of data": lambda m: torch.nn.Parameter(m.weight.data),
    "swap_tensors": lambda m: swapped(m.weight),
    "flop counter": lambda m: counted(m.weight),
}


def swapped(p: Tensor) -> Tensor:
    other = torch.nn.Parameter(torch.zeros(V, D))
    torch.utils.swap_tensors(p, other)
    return other


def counted(p: Tensor) -> Tensor:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False):
        return p * 1


@pytest.mark.parametrize("read", READS)
def test_every_way_to_the_elements_finds_the_dense_values(read: str) -> None:
    pair = Pair()
    got = READS[read](pair.rows).detach().reshape(V, D)
    assert torch.equal(got, pair.dense.weight)


HELD: dict[str, Callable[[Any, Any], Any]] = {
    "state_dict": lambda m, _: m.state_dict()["weight"],
    "data": lambda m, _: m.weight.data,
    "a row": lambda m, _: m.weight.data[3],
    "array": lambda m, _: m.weight.detach().numpy(),
    "memoryview": lambda m, _: memoryview(m.weight.detach().numpy()),
    "capsule": lambda m, _: m.weight.detach().__dlpack__(),
    "storage": lambda m, _: m.weight.untyped_storage(),
    "set_": lambda m, _: set_to(m.weight),
    "tied by data": lambda m, _: tied(m),
    "from_pretrained": lambda m, _: Embedding.from_pretrained(m.weight),
    "optimizer's state_dict": lambda _, optimizer: optimizer.state_dict(),
}


def tied(m: Any) -> Any:
    head = torch.nn.Linear(D, V, bias=False)
    head.weight.data = m.weight.data
    return head


@pytest.mark.parametrize("held", HELD)
def test_while_an_alias_lives_no_row_waits_and_when_it_is_gone_they_wait_again(held: str) -> None:
    pair = Pair()
    alias = HELD[held](pair.rows, pair.optimizers[0])
    pair.train()
    table = pair.rows.weight.table
    assert table.count == 0
    assert torch.equal(table.param, pair.dense.weight)
    assert all(
        torch.equal(s, pair.optimizers[1].state[pair.dense.weight][k])
        for s, k in zip(table.states, ("exp_avg", "exp_avg_sq"), strict=True)
    )
    del alias
    gc.collect()
    pair.train()
    assert table.count == 3
    assert pair.agree()


def test_an_alias_reads_and_writes_the_table() -> None:
    pair = Pair()
    aliases = [m.state_dict()["weight"] for m in (pair.rows, pair.dense)]
    pair.train()
    assert torch.equal(*aliases)
    for alias in aliases:
        alias.mul_(0.5)
        alias[3] = 1.0
    pair.train(seed=5)
    assert torch.equal(*aliases)
    del aliases, alias
    pair.train()
    assert pair.rows.weight.table.count == 3
    assert pair.agree()


@pytest.mark.parametrize("make", [torch.jit.script, lambda model: torch.jit.trace(model, ALL)], ids=["script", "trace"])
def test_a_scripted_model_trains_rows_and_is_saved_as_it_is(make: Any) -> None:
    """torch.jit.save calls no op."""
    pair = Pair()
    models = [torch.nn.Sequential(m) for m in (pair.rows, pair.dense)]
    scripted = make(models[0])
    for seed in range(3):
        for m, optimizer in zip((scripted, models[1]), pair.optimizers, strict=True):
            optimizer.zero_grad()
            indices, dout = batches(1, seed=seed)[0]
            if make is not torch.jit.script:
                indices, dout = ALL, torch.full((V, D), 0.5).double()
            m(indices).backward(dout.float())
            optimizer.step()
    assert pair.rows.weight.grad.is_sparse
    pair.train()
    assert pair.rows.weight.table.count == 0
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    assert torch.equal(torch.jit.load(file)(ALL), models[1](ALL))
    assert pair.agree()


def test_states_are_read_and_held_as_they_are() -> None:
    pair = Pair()
    ours, theirs = (o.state[m.weight] for o, m in zip(pair.optimizers, (pair.rows, pair.dense), strict=True))
    held = dict(ours)
    for _ in range(2):
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(held[key], theirs[key])
        pair.train()
        assert pair.rows.weight.table.count > 0
    state = pair.optimizers[0].state_dict()["state"][0]
    assert all(type(value) is Tensor for value in state.values())
    assert all(
        type(value) is Tensor
        for value in pickle.loads(pickle.dumps(pair.optimizers[0])).state_dict()["state"][0].values()
    )


def test_explain_tells_of_dense_steps() -> None:
    pair = Pair()
    alias = pair.rows.weight.data
    pair.rows(torch.tensor([1])).sum().backward()
    assert "the dense optimizer's cost" in str(llmkern.explain(pair.optimizers[0].step))
    del alias
    assert "the dense optimizer's cost" not in str(llmkern.explain(pair.optimizers[0].step))


def test_the_memory_may_be_replaced() -> None:
    pair = Pair()
    for m in (pair.rows, pair.dense):
        m.weight.data = torch.full((V, D), 0.5)
    pair.train()
    with torch.no_grad():
        for m in (pair.rows, pair.dense):
            m.weight.set_(torch.full((V, D), 0.25))
    pair.train()
    assert pair.agree()
    pair.rows.to_empty(device="cpu")
    pair.rows.load_state_dict(pair.dense.state_dict())
    pair.train()
    assert pair.agree()


def test_a_table_from_the_meta_device_keeps_its_row_gradients() -> None:
    module = Embedding(V, D, device="meta", row_grad="replay").to_empty(device="cpu")
    module.load_state_dict(embedding().state_dict())
    module(torch.tensor([1])).sum().backward()
    assert module.weight.grad.is_sparse
    assert module.weight.replay


def test_attributes_are_pickled_and_row_gradients_kept() -> None:
    module = Pair().rows
    module.weight.tag = "kept"
    for p in (pickle.loads(pickle.dumps(module)).weight, saved(module.weight)):
        assert isinstance(p, RowParameter)
        assert (p.tag, p.replay, p.requires_grad, p.table) == ("kept", True, True, None)
    assert isinstance(copy.deepcopy(module).weight, RowParameter)
    assert repr(module.weight) == repr(torch.nn.Parameter(module.weight.data))


def test_a_replaced_weight_has_torchs_gradient() -> None:
    """What is not a row parameter any more: loaded with assign, pruned, functional_call with other tensors."""
    module = Pair().rows
    assert module.sparse
    values = module.state_dict()["weight"].clone()
    torch.func.functional_call(module, {"weight": values.requires_grad_()}, (ALL,)).sum().backward()
    assert torch.equal(values.grad, torch.ones(V, D))
    torch.nn.utils.prune.l1_unstructured(module, "weight", 0.5)
    module(ALL).sum().backward()
    torch.nn.utils.prune.remove(module, "weight")
    module.load_state_dict({"weight": torch.zeros(V, D)}, assign=True)
    module(ALL).sum().backward()
    assert type(module.weight) is torch.nn.Parameter
    assert torch.equal(module.weight.grad, torch.ones(V, D))
    assert not module.sparse


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_clipping_by_a_norm_that_is_not_finite_spoils_what_the_dense_optimizer_spoils(bad: float, folded: bool) -> None:
    pair = Pair()
    dout = torch.ones(2, D)
    dout[0, 0] = bad
    for m, old in zip((pair.rows, pair.dense), pair.optimizers, strict=True):
        optimizer = optim.AdamW(m.parameters(), lr=0.1, max_grad_norm=1.0 if folded else None)
        optimizer.load_state_dict(copy.deepcopy(old.state_dict()))
        for i in range(2):
            optimizer.zero_grad()
            m(torch.tensor([1, 2 + i])).backward(dout)
            if not folded:
                optim.clip_grad_norm_(m.parameters(), 1.0)
            optimizer.step()
    assert bool(pair.dense.weight.isnan().any())
    torch.testing.assert_close(pair.rows.weight.data, pair.dense.weight.data, rtol=0, atol=0, equal_nan=True)


def test_a_graph_of_the_backward_reaches_the_looked_up_rows() -> None:
    def hessian_product(m: Any) -> Tensor:
        (grad,) = torch.autograd.grad((m(torch.tensor([1, 2, 1])) ** 3).sum(), m.weight, create_graph=True)
        dense = grad.to_dense() if grad.is_sparse else grad
        (product,) = torch.autograd.grad((dense**2).sum(), m.weight)
        return product.to_dense() if product.is_sparse else product

    pair = Pair()
    torch.testing.assert_close(hessian_product(pair.rows), hessian_product(pair.dense))


def test_prepare_keeps_gradients_hooks_and_optimizers() -> None:
    seen: list[str] = []
    module = torch.nn.Embedding(V, D)
    optimizer = optim.Adam(module.parameters())
    p = module.weight
    p.register_hook(lambda grad: seen.append("hook"))
    module(ALL).sum().backward()
    grad = p.grad
    assert optim.prepare(torch.nn.Sequential(module)) == ["0"]
    assert module.weight is p
    assert p.grad is grad
    p.register_post_accumulate_grad_hook(lambda p: seen.append("post"))
    module.zero_grad()
    module(ALL[:2]).sum().backward()
    optimizer.step()
    assert seen == ["hook", "hook", "post"]
    assert p.table.count == 1
