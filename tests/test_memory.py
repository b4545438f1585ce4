"""Extra memory grows linearly with seqlen on every path but the reference: the process's own peak, allocator and arenas included."""

import subprocess
import sys
import textwrap

import pytest

import fused_attention

HALF, FULL = 4096, 8192
SCORES = FULL * FULL * 4 / 2**20  # MiB of one float32 matrix of scores

MEASURE = """
import resource, sys, torch
import fused_attention
from fused_attention import MultiHeadAttention, Rotary, Transformer, TransformerLayer, attention, attention_varlen
torch.set_num_threads(1)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
def operands(length):
    return [torch.randn(1, 2, length, 16, requires_grad=True) for _ in range(3)]
def path(length):
{body}
path(1100)
before = peak()
path({half})
half = peak() - before
path({full})
print(half, peak() - before)
"""

PATHS = {
    "torch, full": "attention(*operands(length), backend='torch').sum().backward()",
    "torch, every option": """
        slopes, sinks = (torch.rand(2, requires_grad=True) for _ in range(2))
        bias = torch.randn(1, 2, length, 1, requires_grad=True)
        mask = torch.rand(1, 1, 1, length) > 0.1
        options = dict(causal=True, window=(length // 2, None), softcap=3.0, dropout_p=0.1, alibi_slopes=slopes, sinks=sinks)
        attention(*operands(length), backend='torch', bias=bias, mask=mask, **options).sum().backward()
    """,
    "torch, second derivative": """
        q, k, v = operands(length)
        first = torch.autograd.grad(attention(q, k, v, causal=True, backend='torch').square().sum(), q, create_graph=True)[0]
        first.square().sum().backward()
    """,
    "torch, packed": """
        q, k, v = ([x.detach()[0].transpose(0, 1).contiguous().requires_grad_() for x in operands(length)])
        attention_varlen(q, k, v, torch.tensor([0, length // 3, length]), backend='torch').sum().backward()
    """,
    "cpu, causal": "attention(*operands(length), causal=True, backend='cpu').sum().backward()",
    "forward mode": """
        from torch.func import jvp
        q, k, v = (x.detach() for x in operands(length))
        jvp(lambda q: attention(q, k, v, causal=True), (q,), (q.cos(),))
    """,
    "layer, causal": "TransformerLayer(32, 2, 32, batch_first=True)(torch.randn(1, length, 32), is_causal=True).sum().backward()",
    "modern layer, dropout": """
        options = dict(norm_first=True, norm="rms", rotary=Rotary(), qk_norm="rms", window=(length // 2, 0), sinks=True, num_kv_heads=1)
        layer = TransformerLayer(32, 2, 32, 0.1, "swiglu", batch_first=True, **options)
        layer(torch.randn(1, length, 32), is_causal=True).sum().backward()
        with torch.no_grad():
            layer.eval()(torch.randn(1, length, 32), is_causal=True)
    """,
    "transformer, causal and padded": """
        src, tgt = (torch.randn(1, length, 32) for _ in range(2))
        padding = torch.arange(length)[None] > length - 100
        call = dict(tgt_is_causal=True, src_key_padding_mask=padding, memory_key_padding_mask=padding)
        Transformer(32, 2, 1, 1, 32, batch_first=True)(src, tgt, **call).sum().backward()
    """,
}


def measure(body):
    script = MEASURE.format(body=textwrap.indent(textwrap.dedent(body).strip(), "    "), half=HALF, full=FULL)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return (float(word) for word in result.stdout.split())


@pytest.mark.parametrize("path", PATHS)
def test_memory_grows_linearly(path):
    reason = fused_attention.backends().get(path.split(",")[0])
    if reason is not None:
        pytest.skip(reason)
    half, full = measure(PATHS[path])
    assert full <= 2.5 * half + 48, f"{half:.0f} MiB at {HALF}, {full:.0f} MiB at {FULL}: more than linear"
    assert full < SCORES / 2, f"{full:.0f} MiB at {FULL}, a matrix of scores has {SCORES:.0f} MiB"


def test_the_measure_sees_a_quadratic_path():
    half, full = measure("attention(*(x.detach() for x in operands(length)), backend='reference')")
    assert full > 2.5 * half + 48
