"""ONNX Runtime and OpenVINO, both on one ONNX graph: recurrent inference, whole sequences and step by step, and lookup.

ONNX's recurrent operators hold one layer with all its directions; their gate orders are iofc and zrh.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from . import bench_embedding, bench_rnn
from .peers import AbsentError, Implementation
from .suite import Call, Run, namespace

# torch's gates in ONNX's order.
ORDER = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}
Session = Callable[[dict[str, np.ndarray]], list[np.ndarray]]


class Peer(Implementation):
    def __init__(self, runtime: str) -> None:
        self.session: Callable[[onnx.ModelProto, Run], Session] = {
            "onnxruntime": _onnxruntime,
            "openvino": _openvino,
        }[runtime]
        self.bf16 = runtime == "openvino"

    def setup(self, run: Run, device: str) -> Call:
        sizes, problem = run.case.sizes, run.case.problem
        if run.phase != "forward":
            raise AbsentError("inference only")
        if run.dtype != "fp32" and not (self.bf16 and run.dtype == "bf16"):
            raise AbsentError(f"has no {run.dtype} on the CPU")
        if problem == "embedding":
            return self._embedding(run)
        if sizes.get("variant") in ("packed", "proj"):
            raise AbsentError(f"ONNX has no {sizes['variant']} sequences")
        return self._steps(run) if problem == "rnn_steps" else self._sequence(run)

    def _embedding(self, run: Run) -> Call:
        module, indices, _ = bench_embedding.draw(namespace("torch"), run.case.sizes, run.place())
        graph = _Graph()
        graph.node("Gather", [graph.constant("table", module.weight), "indices"], ["out"])
        model = graph.model({"indices": (TensorProto.INT64, indices.shape)}, ["out"])
        session, inputs = self.session(model, run), {"indices": indices.numpy()}
        return lambda: {"out": session(inputs)[0]}

    def _sequence(self, run: Run) -> Call:
        sizes = run.case.sizes
        module, x, _ = bench_rnn.draw(namespace("torch"), sizes, run.place())
        graph, name = _Graph(), "x"
        for k in range(sizes["layers"]):
            name = graph.recurrent(sizes["kind"], dict(module.named_parameters()), k, name, [])[0]
        session = self.session(graph.model({"x": (TensorProto.FLOAT, x.shape)}, [name]), run)
        inputs = {"x": x.float().numpy()}
        return lambda: {"y": session(inputs)[0]}

    def _steps(self, run: Run) -> Call:
        sizes = run.case.sizes
        B, H = sizes["B"], sizes["H"]
        module, x, _ = bench_rnn.draw_steps(namespace("torch"), sizes, run.place())
        # A cell's parameters have no layer number.
        named = {name if "_l0" in name else f"{name}_l0": p for name, p in module.named_parameters()}
        graph = _Graph()
        _, h, c = graph.recurrent("LSTM", named, 0, "x", ["h", "c"])
        shapes = {"x": (1, *x.shape[1:]), "h": (1, B, H), "c": (1, B, H)}
        model = graph.model({name: (TensorProto.FLOAT, shape) for name, shape in shapes.items()}, [h, c])
        session, steps = self.session(model, run), x.float().numpy()[:, None]

        def call() -> dict[str, Any]:
            h = c = np.zeros((1, B, H), np.float32)
            for step in steps:
                # Copies: OpenVINO's results are its own memory, which the next call writes.
                h, c = (state.copy() for state in session({"x": step, "h": h, "c": c}))
            return {"h": h[0], "c": c[0]}

        return call


class _Graph:
    """An ONNX graph under construction."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def node(self, op: str, inputs: list[str], outputs: list[str], **attributes: Any) -> None:
        self.nodes.append(helper.make_node(op, inputs, outputs, **attributes))

    def constant(self, name: str, tensor: torch.Tensor) -> str:
        values = tensor.detach()
        values = values.float() if values.is_floating_point() else values
        self.constants.append(numpy_helper.from_array(values.contiguous().numpy(), name))
        return name

    def recurrent(
        self, kind: str, named: Mapping[str, torch.Tensor], k: int, x: str, states: list[str]
    ) -> tuple[str, str, str]:
        """Layer k; returns the names of y (T, B, directions * H), h and c."""
        sides = [s for s in ("", "_reverse") if f"weight_ih_l{k}{s}" in named]

        def stacked(*names: str) -> torch.Tensor:
            """(directions, gates * H, ...): these parameters one after the other, gates in ONNX's order."""
            parts = []
            for side in sides:
                gates = (named[f"{name}_l{k}{side}"].unflatten(0, (len(ORDER[kind]), -1)) for name in names)
                parts.append(torch.cat([g[list(ORDER[kind])].flatten(0, 1) for g in gates]))
            return torch.stack(parts)

        inputs = [x, self.constant(f"W{k}", stacked("weight_ih")), self.constant(f"R{k}", stacked("weight_hh"))]
        inputs += [self.constant(f"B{k}", stacked("bias_ih", "bias_hh")), "", *states]
        outputs = [f"Y{k}", f"h{k}", f"c{k}"][: 3 if kind == "LSTM" else 2]
        attributes: dict[str, Any] = {"linear_before_reset": 1} if kind == "GRU" else {}
        H = named[f"weight_hh_l{k}"].shape[1]
        direction = "bidirectional" if sides[1:] else "forward"
        self.node(kind, inputs, outputs, hidden_size=H, direction=direction, **attributes)
        # (T, directions, B, H) -> (T, B, directions * H)
        self.node("Transpose", [f"Y{k}"], [f"Yt{k}"], perm=[0, 2, 1, 3])
        self.node("Reshape", [f"Yt{k}", self.constant(f"shape{k}", torch.tensor([0, 0, -1]))], [f"y{k}"])
        return f"y{k}", f"h{k}", f"c{k}"

    def model(self, inputs: dict[str, tuple[int, Any]], outputs: list[str]) -> onnx.ModelProto:
        ins = [helper.make_tensor_value_info(name, kind, list(shape)) for name, (kind, shape) in inputs.items()]
        outs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
        graph = helper.make_graph(self.nodes, "case", ins, outs, self.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def _onnxruntime(model: onnx.ModelProto, run: Run) -> Session:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = run.case.threads or torch.get_num_threads()
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return lambda inputs: session.run(None, inputs)


def _openvino(model: onnx.ModelProto, run: Run) -> Session:
    import openvino

    core = openvino.Core()
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        # Left alone, it takes bf16 for fp32 where the processor is faster in it.
        "INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[run.dtype],
        "INFERENCE_NUM_THREADS": str(run.case.threads or torch.get_num_threads()),
    }
    request = core.compile_model(core.read_model(model.SerializeToString()), "CPU", options).create_infer_request()

    def infer(inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        # The results live in the request's own memory until its next call, which is how it is used for speed.
        return list(request.infer(inputs, share_inputs=True, share_outputs=True).values())

    return infer
