"""FBGEMM's table-batched embedding on the CPU: lookups and sum or mean bags, with a dense gradient."""

from __future__ import annotations

from typing import Any

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import DenseTableBatchedEmbeddingBagsCodegen

from . import bench_embedding, bench_embedding_bag
from .peers import AbsentError, Implementation
from .suite import Call, Run, namespace


class Peer(Implementation):
    def setup(self, run: Run, device: str) -> Call:
        sizes, place = run.case.sizes, run.place(device)
        bag = run.case.problem == "embedding_bag"
        pooling = {"sum": PoolingMode.SUM, "mean": PoolingMode.MEAN}.get(sizes["mode"] if bag else "sum")
        if pooling is None or run.dtype != "fp32" or run.case.threads:
            raise AbsentError("measured in fp32, sum and mean, on all threads")
        module, indices, dout = (bench_embedding_bag if bag else bench_embedding).draw(namespace("torch"), sizes, place)
        table = DenseTableBatchedEmbeddingBagsCodegen([(sizes["V"], sizes["D"])], pooling_mode=pooling, use_cpu=True)
        with torch.no_grad():
            table.weights.copy_(module.weight.flatten())
        del module
        # A lookup is a bag of one row.
        offsets = torch.arange(0, indices.numel() + 1, indices.shape[-1] if bag else 1)
        flat = indices.flatten()

        def call() -> dict[str, Any]:
            if run.phase == "forward":
                with torch.no_grad():
                    return {"out": table(flat, offsets)}
            table.weights.grad = None
            out = table(flat, offsets)
            out.backward(dout)
            return {"out": out, "dweight": table.weights.grad}

        return call
