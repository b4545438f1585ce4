"""Races beside libraries that not every machine has: flex_attention, which has to be compiled, and onnxruntime.

q, k, v of one workload, fp32, no gradients          NotImplementedError with a sentence where the library is missing or refuses
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fused_attention import attention

from .contenders import OURS, ours
from .races import SEED, Race
from .rivals import flex
from .workloads import Workload, attention_inputs

FLEX, ONNXRUNTIME = "flex_attention", "onnxruntime"
OPSET, IR_VERSION = 17, 8  # of the model: whatever onnxruntime reads them


@functools.cache  # to compile takes half a minute
def flex_race(workload: Workload, *, compiled: bool = True) -> Race:
    """Beside flex_attention, with a block mask where the call is causal."""
    inputs = attention_inputs(replace(workload, backward=False), torch.float32, SEED)  # on CPUs it has none
    theirs = flex(inputs, compiled=compiled).forward
    try:
        with torch.no_grad():
            theirs()
    except RuntimeError as error:  # of a compiler that is missing or fails
        raise NotImplementedError(f"flex_attention does not compile here: {str(error).splitlines()[0]}") from error
    return Race({OURS: ours(inputs).forward, FLEX: theirs})


def onnxruntime_race(workload: Workload) -> Race:
    """Beside com.microsoft's MultiHeadAttention. It takes (batch, seqlen, heads * head_dim), and so do we, by a view."""
    try:
        runtime, onnx = (importlib.import_module(name) for name in ("onnxruntime", "onnx"))
    except ImportError as error:
        raise NotImplementedError(f"{error}: `pip install onnxruntime onnx` to race beside it") from error
    inputs = attention_inputs(workload, torch.float32, SEED)
    rows = {name: x.detach().transpose(1, 2).contiguous() for name, x in zip("qkv", (inputs.q, inputs.k, inputs.v), strict=True)}
    q, k, v = (x.transpose(1, 2) for x in rows.values())
    out = torch.empty_like(rows["q"])
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(_model(onnx, workload), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    shape = (workload.batch, workload.seqlen_q, workload.embed_dim)
    for name, x in rows.items():
        binding.bind_input(name, "cpu", 0, onnx.TensorProto.FLOAT, shape, x.data_ptr())
    binding.bind_output("out", "cpu", 0, onnx.TensorProto.FLOAT, shape, out.data_ptr())

    def theirs() -> Tensor:
        session.run_with_iobinding(binding)
        return out.transpose(1, 2)

    return Race({OURS: lambda: attention(q, k, v, causal=workload.causal), ONNXRUNTIME: theirs})


def _model(onnx: Any, workload: Workload) -> bytes:
    """One node."""
    helper = onnx.helper
    shape = (workload.batch, workload.seqlen_q, workload.embed_dim)
    q, k, v, out = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in ("q", "k", "v", "out"))
    attributes = {"num_heads": workload.heads, "unidirectional": int(workload.causal)}
    node = helper.make_node("MultiHeadAttention", list("qkv"), ["out"], domain="com.microsoft", **attributes)
    graph = helper.make_graph([node], "attention", [q, k, v], [out])
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    model: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION).SerializeToString()
    return model
