"""The options of MultiHeadAttention beyond torch's, and their definition in float64: one head of one member after the other."""

import pytest
import torch
from torch import nn

from fused_attention import MultiHeadAttention, Rotary
from fused_attention.rotary import LinearScaling

EMBED_DIM, HEADS, BATCH, QUERIES, KEYS = 24, 4, 2, 5, 7
HEAD_DIM = EMBED_DIM // HEADS

EXTRAS = {
    "grouped heads": {"num_kv_heads": 2},
    "one head of keys": {"num_kv_heads": 1, "bias": False},
    "grouped heads of unlike inputs": {"num_kv_heads": 2, "kdim": 5, "vdim": 9},
    "heads of their own size": {"head_dim": 10},
    "smaller heads, in groups, of unlike inputs": {"head_dim": 4, "num_kv_heads": 2, "kdim": 5, "vdim": 9, "rotary": Rotary()},
    "added keys of their own size": {"head_dim": 10, "add_bias_kv": True, "add_zero_attn": True},
    "rotary": {"rotary": Rotary(base=100.0, scaling=LinearScaling(2.0))},
    "rotary of a part": {"rotary": Rotary(base=100.0, dim=4, interleaved=True, offset=3)},
    "rms of heads": {"qk_norm": "rms"},
    "layer norm of heads": {"qk_norm": "layer", "qk_norm_eps": 0.1},
    "window": {"window": (2, 1)},
    "softcap": {"softcap": 0.5},
    "scale": {"scale": -0.3},
    "sinks": {"sinks": True},
    "alibi": {"alibi": True},
    "no bias of queries, keys and values": {"qkv_bias": False},
    "no bias of the output": {"out_bias": False},
    "biases of queries, keys and values alone": {"bias": False, "qkv_bias": True},
    "bias of the output alone": {"bias": False, "out_bias": True},
    "beside added keys": {"add_bias_kv": True, "add_zero_attn": True, "sinks": True, "softcap": 1.0, "qk_norm": "rms", "rotary": Rotary()},
    "all": {
        "num_kv_heads": 2,
        "rotary": Rotary(base=50.0, dim=2),
        "qk_norm": "rms",
        "window": (3, None),
        "softcap": 2.0,
        "scale": 0.7,
        "sinks": True,
        "alibi": True,
        "qkv_bias": False,
    },
}
extras = pytest.mark.parametrize("options", EXTRAS.values(), ids=EXTRAS)

MASKS = {
    "none": lambda sq, sk: {},
    "causal": lambda sq, sk: {"is_causal": True},
    "padding": lambda sq, sk: {"key_padding_mask": hidden_keys(sk)},
    "bool and causal": lambda sq, sk: {"attn_mask": some_hidden(sq, sk), "is_causal": True},
    "float of each head": lambda sq, sk: {
        "attn_mask": torch.linspace(-1, 1, BATCH * HEADS * sq * sk, dtype=torch.float64).view(-1, sq, sk)
    },
    "a query sees nothing": lambda sq, sk: {
        "attn_mask": torch.arange(sq)[:, None].eq(1).expand(sq, sk),
        "key_padding_mask": hidden_keys(sk),
    },
}
masks = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


def hidden_keys(seqlen):
    hidden = torch.zeros(BATCH, seqlen, dtype=torch.bool)
    hidden[1, 3:] = True
    return hidden


def some_hidden(seqlen_q, seqlen_k):
    return torch.arange(seqlen_q * seqlen_k).view(seqlen_q, seqlen_k) % 3 == 1


def build(options, batch_first=True, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    module = MultiHeadAttention(EMBED_DIM, HEADS, batch_first=batch_first, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return module


def sequences(module, cross, batched=True):
    draw = torch.Generator().manual_seed(1)
    lengths = (QUERIES, KEYS, KEYS) if cross else (QUERIES,) * 3
    found = [
        torch.randn(BATCH, seqlen, width, generator=draw, dtype=torch.float64)
        for seqlen, width in zip(lengths, (EMBED_DIM, module.kdim, module.vdim), strict=True)
    ]
    if not cross and module._qkv_same_embed_dim:
        found = [found[0]] * 3
    return [x if module.batch_first else x.transpose(0, 1) for x in found] if batched else [x[0] for x in found]


def definition(options, state, query, key, value, key_padding_mask=None, attn_mask=None, is_causal=False):
    """Output (batch, seqlen_q, embed_dim) and weights (batch, heads, seqlen_q, seqlen_k), one head of one member after the other."""
    kv_heads, head_dim = options.get("num_kv_heads", HEADS), options.get("head_dim", HEAD_DIM)
    sizes = [HEADS * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    if "in_proj_weight" in state:
        projections = state["in_proj_weight"].split(sizes)
    else:
        projections = [state[f"{name}_proj_weight"] for name in "qkv"]
    biases = state["in_proj_bias"].split(sizes) if "in_proj_bias" in state else (0.0, 0.0, 0.0)
    outs, weights = [], []
    for member in range(query.shape[0]):
        q, k, v = (
            (x[member] @ weight.T + bias).unflatten(-1, (-1, head_dim))
            for x, weight, bias in zip((query, key, value), projections, biases, strict=True)
        )
        for head in range(HEADS):
            group = head // (HEADS // kv_heads)
            q_h, k_h, v_h = q[:, head], k[:, group], v[:, group]
            if "qk_norm" in options:
                q_h, k_h = (normed(options, state, name, x) for name, x in (("q_norm", q_h), ("k_norm", k_h)))
            if "rotary" in options:
                q_h, k_h = turned(options["rotary"], q_h), turned(options["rotary"], k_h)
            added = 0
            if "bias_k" in state:
                here = slice(head * head_dim, (head + 1) * head_dim)
                k_h, v_h = torch.cat([k_h, state["bias_k"][0, :, here]]), torch.cat([v_h, state["bias_v"][0, :, here]])
                added += 1
            if options.get("add_zero_attn"):
                k_h, v_h = (torch.cat([x, x.new_zeros(1, head_dim)]) for x in (k_h, v_h))
                added += 1
            scores = options.get("scale", head_dim**-0.5) * (q_h @ k_h.T)
            if "softcap" in options:
                scores = options["softcap"] * torch.tanh(scores / options["softcap"])
            distance = torch.arange(len(k_h) - added) - torch.arange(len(q_h))[:, None]  # positive where the key is later
            if options.get("alibi"):
                scores = scores - 2.0 ** (-8 * (head + 1) / HEADS) * distance.abs()
            hidden = torch.zeros(len(q_h), len(k_h) - added, dtype=torch.bool)
            left, right = options.get("window", (None, None))
            hidden |= distance > (len(k_h) if right is None else right)
            hidden |= distance < (-len(q_h) if left is None else -left)
            if is_causal:
                hidden |= distance > 0
            if key_padding_mask is not None:
                hidden |= key_padding_mask[member]
            if attn_mask is not None:
                mask = attn_mask if attn_mask.dim() == 2 else attn_mask[member * HEADS + head]
                if mask.dtype is torch.bool:
                    hidden |= mask
                else:
                    scores = scores + nn.functional.pad(mask, (0, added))
            exponents = torch.exp(scores).masked_fill(nn.functional.pad(hidden, (0, added)), 0.0)
            total = exponents.sum(-1, keepdim=True)
            if options.get("sinks"):
                total = total + torch.exp(state["sinks"][head])
            p = exponents / torch.where(total == 0, 1.0, total)
            outs.append(p @ v_h)
            weights.append(p)
    out = torch.stack(outs).view(-1, HEADS, query.shape[1], head_dim).transpose(1, 2).flatten(2)
    out = out @ state["out_proj.weight"].T + state.get("out_proj.bias", 0.0)
    return out, torch.stack(weights).view(-1, HEADS, query.shape[1], weights[0].shape[-1])


def normed(options, state, name, x):
    centre = x.mean(-1, keepdim=True) if options["qk_norm"] == "layer" else 0.0
    size = ((x - centre).square().mean(-1, keepdim=True) + options.get("qk_norm_eps", 1e-6)).sqrt()
    return (x - centre) / size * state[f"{name}.weight"] + state.get(f"{name}.bias", 0.0)


def turned(rotary, x):
    """Each pair as a complex number, times exp(i · position · frequency)."""
    dim = rotary.dim or x.shape[-1]
    factor = 1.0 if rotary.scaling is None else rotary.scaling.factor
    columns = list(x.unbind(-1))
    for pair in range(dim // 2):
        a, b = (2 * pair, 2 * pair + 1) if rotary.interleaved else (pair, pair + dim // 2)
        angle = (torch.arange(len(x)) + rotary.offset).double() * rotary.base ** (-2 * pair / dim) / factor
        number = torch.complex(columns[a], columns[b]) * torch.polar(torch.ones_like(angle), angle)
        columns[a], columns[b] = number.real, number.imag
    return torch.stack(columns, -1)
