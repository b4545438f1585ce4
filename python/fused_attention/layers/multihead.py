"""Multi-head attention as a drop-in for torch's: same parameters, arguments, results and errors, on our attention.

    MultiHead(Q, K, V) = Concat(head_1, ..., head_h) W_O,    head_i = attention(Q W_Q_i, K W_K_i, V W_V_i)

Source: Vaswani et al., "Attention Is All You Need", NeurIPS 2017, https://arxiv.org/abs/1706.03762
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_attention.dropout import new_seed
from fused_attention.functional import attention, attention_weights, attention_with_lse

from .masks import add_causal_mask, pad_nested, score_masks


class MultiHeadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` with its constructor, state dict, initial weights and arguments, computed by `attention`.

    Where it means to differ:
    - `is_causal=True` is an instruction, not a hint: query i sees no key after i, with or without masks.
      The columns of add_bias_kv and add_zero_attn stay visible to every query.
    - A query that sees no key gets zeros before out_proj, zero weights and finite gradients.
    - `need_weights=True` keeps the fused output; the weights are computed beside it.
    - `out_proj` is called as a module, so hooks and wrappers on it run.
    - Training and evaluation run the same code; the output is contiguous in both.
    - Dropout draws from this library's generator: equal to torch's in distribution, not seed for seed.

    What `attention` cannot take (inputs and weights of different dtypes, nested tensors) torch computes;
    what is wrong torch refuses, in its own words. Under TorchScript the module runs torch's functions.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Output and, if asked for, the attention weights after dropout.

        query: (seqlen_q, batch, embed_dim), (batch, seqlen_q, embed_dim) with batch_first, or (seqlen_q, embed_dim).
        key, value: alike, of seqlen_k and kdim, vdim.
        key_padding_mask: (batch, seqlen_k) or (seqlen_k,); bool, True hides the key, or floating, added to the scores.
        attn_mask: (seqlen_q, seqlen_k) or (batch * num_heads, seqlen_q, seqlen_k); bool, True hides the pair, or floating, added.

        Returns an output shaped like query, and None or weights: (batch, seqlen_q, seqlen_k), or with average_attn_weights=False
        (batch, num_heads, seqlen_q, seqlen_k); without the batch for unbatched input.
        """
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            # TorchScript compiles neither super() nor attention(): torch's function stands here in full.
            nested = query.is_nested  # torch's encoder nests padded batches in evaluation, scripted too
            if nested:
                query, key_padding_mask = pad_nested(query)
                key = value = query
            swap = self.batch_first and query.dim() == 3
            if swap:
                query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
            if is_causal:
                attn_mask = add_causal_mask(attn_mask, key_padding_mask, query, key, 0)
            out, weights = F.multi_head_attention_forward(
                query,
                key,
                value,
                self.embed_dim,
                self.num_heads,
                self.in_proj_weight,
                self.in_proj_bias,
                self.bias_k,
                self.bias_v,
                self.add_zero_attn,
                self.dropout,
                self.out_proj.weight,
                self.out_proj.bias,
                training=self.training,
                key_padding_mask=key_padding_mask,
                need_weights=need_weights,
                attn_mask=attn_mask,
                use_separate_proj_weight=not self._qkv_same_embed_dim,
                q_proj_weight=self.q_proj_weight,
                k_proj_weight=self.k_proj_weight,
                v_proj_weight=self.v_proj_weight,
                average_attn_weights=average_attn_weights,
            )
            out = out.transpose(0, 1) if swap else out
            if nested and key_padding_mask is not None:
                out = torch._nested_tensor_from_mask(out, key_padding_mask.logical_not(), False)
            return out, weights
        if not self._can_attend(query, key, value, key_padding_mask, need_weights, attn_mask):
            return self._torch_forward(query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        return self._attend(query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        average_attn_weights: bool,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor | None]:
        batched = query.dim() == 3
        if attn_mask is not None and key_padding_mask is not None and attn_mask.dtype != key_padding_mask.dtype:
            # torch deprecates masks of two dtypes: its own function warns, in the words of the installed version.
            key_padding_mask = F._canonical_mask(key_padding_mask, "key_padding_mask", attn_mask.dtype, "attn_mask", query.dtype)
        if key_padding_mask is not None and not batched:
            key_padding_mask = key_padding_mask[None]
        q, k, v = (self._split_heads(x) for x in self._project(query, key, value))
        k, v, columns = self._add_columns(k, v)
        mask, bias = score_masks(attn_mask, key_padding_mask, self.num_heads, columns)
        dropout_p = float(self.dropout) if self.training else 0.0
        options: dict[str, Any] = {
            "causal": _hint(is_causal) if attn_mask is not None and torch.compiler.is_compiling() else bool(is_causal),
            "offset": columns,  # query i sees key i, as in torch; the added columns stand in front, where causal never hides them
            "mask": mask,
            "bias": bias,
            "dropout_p": dropout_p,
            "dropout_seed": new_seed(q.device) if dropout_p > 0.0 else None,
        }
        weights = None
        if need_weights:
            out, lse = attention_with_lse(q, k, v, **options)
            weights = attention_weights(q, k, lse, average_heads=average_attn_weights, **options)
            weights = weights.roll(-columns, -1) if columns else weights  # torch returns the added columns last
            weights = weights if batched else weights.squeeze(0)
        else:
            out = attention(q, k, v, **options)
        return self.out_proj(self._join_heads(out, batched)), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The three in-projections, in as few matrix products as identical inputs allow."""
        bias, embed_dim = self.in_proj_bias, self.embed_dim
        if not self._qkv_same_embed_dim:
            q_bias, k_bias, v_bias = (None, None, None) if bias is None else bias.chunk(3)
            return (
                F.linear(query, self.q_proj_weight, q_bias),
                F.linear(key, self.k_proj_weight, k_bias),
                F.linear(value, self.v_proj_weight, v_bias),
            )
        weight = self.in_proj_weight
        if query is key and key is value:
            q, k, v = F.linear(query, weight, bias).chunk(3, -1)
            return q, k, v

        def rows(x: Tensor, start: int, end: int) -> Tensor:
            part = slice(start * embed_dim, end * embed_dim)
            return F.linear(x, weight[part], None if bias is None else bias[part])

        if key is value:
            k, v = rows(key, 1, 3).chunk(2, -1)
            return rows(query, 0, 1), k, v
        if query is key:
            q, k = rows(query, 0, 2).chunk(2, -1)
            return q, k, rows(value, 2, 3)
        return rows(query, 0, 1), rows(key, 1, 2), rows(value, 2, 3)

    def _split_heads(self, x: Tensor) -> Tensor:
        """A view (batch, heads, seqlen, head_dim) of a projection in the order of the module's inputs."""
        x = x.view(*x.shape[:-1], self.num_heads, self.embed_dim // self.num_heads)
        if x.dim() == 3:
            return x.transpose(0, 1)[None]
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _join_heads(self, out: Tensor, batched: bool) -> Tensor:
        """(batch, heads, seqlen, head_dim) in the order of the module's inputs, heads side by side: a view, as out has the strides of q."""
        if not batched:
            return out.squeeze(0).transpose(0, 1).flatten(1)
        return (out.transpose(1, 2) if self.batch_first else out.permute(2, 0, 1, 3)).flatten(2)

    def _add_columns(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """k and v with the keys of add_bias_kv and add_zero_attn in front, and how many those are."""
        if self.bias_k is None and not self.add_zero_attn:
            return k, v, 0
        k_parts, v_parts = [k], [v]
        batch, heads, _, head_dim = k.shape
        if self.add_zero_attn:
            k_parts.insert(0, k.new_zeros(batch, heads, 1, head_dim))
            v_parts.insert(0, v.new_zeros(batch, heads, 1, head_dim))
        if self.bias_k is not None and self.bias_v is not None:
            k_parts.insert(0, self.bias_k.view(1, heads, 1, head_dim).expand(batch, -1, -1, -1))
            v_parts.insert(0, self.bias_v.view(1, heads, 1, head_dim).expand(batch, -1, -1, -1))
        return torch.cat(k_parts, 2), torch.cat(v_parts, 2), len(k_parts) - 1

    def _can_attend(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, need_weights: bool, attn_mask: Tensor | None
    ) -> bool:
        """Whether torch accepts the call and `attention` can take it: the one check of the inputs."""
        dims = query.dim()
        if query.is_nested or key.is_nested or value.is_nested or dims not in (2, 3) or key.dim() != dims or value.dim() != dims:
            return False
        if (self.in_proj_weight is None) == self._qkv_same_embed_dim or (self.bias_k is None) != (self.bias_v is None):
            return False
        features = (query.shape[-1], key.shape[-1], value.shape[-1])
        if features != (self.embed_dim, self.kdim, self.vdim) or self.embed_dim % self.num_heads or key.shape[:-1] != value.shape[:-1]:
            return False
        if self.training and not 0.0 <= self.dropout <= 1.0:
            return False
        batch_dim, seq_dim = (0, 1) if self.batch_first else (1, 0)
        if dims == 2:
            batch, seqlen_q, seqlen_k = 1, query.shape[0], key.shape[0]
        elif query.shape[batch_dim] == key.shape[batch_dim]:
            batch, seqlen_q, seqlen_k = query.shape[batch_dim], query.shape[seq_dim], key.shape[seq_dim]
        else:
            return False
        padding_shape = (batch, seqlen_k) if dims == 3 else (seqlen_k,)
        if key_padding_mask is not None and key_padding_mask.shape != padding_shape:
            return False
        if attn_mask is not None and attn_mask.shape not in ((seqlen_q, seqlen_k), (batch * self.num_heads, seqlen_q, seqlen_k)):
            return False
        weight = self.in_proj_weight if self._qkv_same_embed_dim else self.q_proj_weight
        dtype = query.dtype
        alike = dtype == key.dtype == value.dtype == weight.dtype == (weight if self.in_proj_bias is None else self.in_proj_bias).dtype
        if not (dtype.is_floating_point and alike) and not _autocasts(query):
            return False
        if dtype is torch.float64 and _autocasts(query):  # autocast leaves torch's linear layers in float64, and would not leave attention
            return False
        return all(mask is None or _mask_fits(mask, query, need_weights) for mask in (attn_mask, key_padding_mask))

    def _torch_forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        average_attn_weights: bool,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """What torch computes, or its error; causal where torch would ignore the hint."""
        if query.is_nested and is_causal and self._takes_nested(query, key, value, key_padding_mask, attn_mask):
            return self._attend_nested(query, need_weights, average_attn_weights)
        if is_causal and not query.is_nested and query.dim() in (2, 3) and key.dim() == query.dim():
            seq_dim = 1 if self.batch_first and query.dim() == 3 else 0
            full = (query.shape[seq_dim], key.shape[seq_dim])
            addable = attn_mask is None or attn_mask.dtype is torch.bool or attn_mask.is_floating_point()
            if addable and (attn_mask is None or attn_mask.shape[-2:] == full):
                attn_mask = add_causal_mask(attn_mask, key_padding_mask, query, key, seq_dim)
            is_causal = False  # with the hint torch drops attn_mask, and a wrong one passes unseen
        return super().forward(query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)

    def _takes_nested(self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None) -> bool:
        """Whether torch documents the nested call as one it takes: self-attention at inference, without masks."""
        needs_grad = torch.is_grad_enabled() and (query.requires_grad or any(parameter.requires_grad for parameter in self.parameters()))
        alone = query is key and key is value and key_padding_mask is None and attn_mask is None
        return alone and query.layout is torch.strided and query.dim() == 3 and self.batch_first and not self.training and not needs_grad

    def _attend_nested(self, x: Tensor, need_weights: bool, average_attn_weights: bool) -> tuple[Tensor, Tensor | None]:
        """Causal self-attention of a nested (batch, seqlen, embed_dim), padded meanwhile: torch's operator for it ignores the hint."""
        padded, padding = pad_nested(x)
        out, weights = self._attend(padded, padded, padded, padding, need_weights, None, average_attn_weights, True)
        return torch._nested_tensor_from_mask(out, ~padding, mask_check=False), weights


def _autocasts(x: Tensor) -> bool:
    device_type = x.device.type
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def _mask_fits(mask: Tensor, query: Tensor, need_weights: bool) -> bool:
    if mask.device != query.device:
        return False
    if mask.dtype in (torch.bool, query.dtype):
        return True
    # torch adds fp32 masks to half precision scores only where its fused kernels do the addition.
    fused = mask.dtype is torch.float32 and query.dtype in (torch.float16, torch.bfloat16) and not need_weights
    return mask.is_floating_point() and (fused or _autocasts(query))


def _hint(is_causal: bool) -> bool:
    """is_causal, or False where tracing cannot tell: from comparing the mask with a causal one, which then hides as much by itself."""
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return guard_or_false(is_causal)
