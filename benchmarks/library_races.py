"""Races beside libraries that not every machine has: flex_attention, which has to be compiled, and onnxruntime.

q, k, v of one workload, fp32, no gradients

Nothing is timed before it is judged. NotImplementedError with a sentence where the library is missing, refuses or is wrong; a
RuntimeError where ours is wrong.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fused_attention import attention

from .contenders import OURS, ours
from .gate import AttentionGate
from .races import SEED, Race
from .rivals import compiled_flex, flex
from .workloads import AttentionInputs, Workload, attention_inputs

FLEX, ONNXRUNTIME = "flex_attention", "onnxruntime"
OPSET, IR_VERSION = 17, 8  # of the model: whatever onnxruntime reads them


def flex_race(workload: Workload, *, compiled: bool = True) -> Race:
    """Beside flex_attention, with a block mask where the call is causal."""
    inputs = _inputs(workload)
    theirs = flex(inputs, _compiled() if compiled else None, compiled=False).forward
    try:
        with torch.no_grad():
            theirs()
    except RuntimeError as error:  # of a compiler that is missing or fails
        raise NotImplementedError(f"flex_attention does not compile here: {str(error).splitlines()[0]}") from error
    return _judged(inputs, ours(inputs).forward, FLEX, theirs)


@functools.cache
def _compiled() -> Callable[..., Any]:
    """Once for all runs: a workload takes it half a minute."""
    return compiled_flex()


def onnxruntime_race(workload: Workload) -> Race:
    """Beside com.microsoft's MultiHeadAttention. It takes (batch, seqlen, heads * head_dim), and so do we, by a view."""
    try:
        runtime, onnx = (importlib.import_module(name) for name in ("onnxruntime", "onnx"))
    except ImportError as error:
        raise NotImplementedError(f"{error}: `pip install onnxruntime onnx` to race beside it") from error
    inputs = _inputs(workload)
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

    return _judged(inputs, lambda: attention(q, k, v, causal=workload.causal), ONNXRUNTIME, theirs)


def _inputs(workload: Workload) -> AttentionInputs:
    return attention_inputs(replace(workload, backward=False), torch.float32, SEED)  # on CPUs flex_attention has none


def _judged(inputs: AttentionInputs, our_call: Callable[[], Tensor], library: str, theirs: Callable[[], Tensor]) -> Race:
    gate = AttentionGate(inputs)
    with torch.no_grad():
        wrong, their_wrong = (gate.judge({"out": call()}, bounded=call is our_call)["forward"].failure for call in (our_call, theirs))
    if wrong is not None:
        raise RuntimeError(f"ours is wrong beside {library}: {wrong}")
    if their_wrong is not None:
        raise NotImplementedError(f"{library} is wrong here: {their_wrong}")
    return Race({OURS: our_call, library: theirs})


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
