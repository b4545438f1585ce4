"""Multi-head attention as a drop-in for torch's: same parameters, arguments, results and errors, on our attention.

    MultiHead(Q, K, V) = Concat(head_1, ..., head_h) W_O,    head_i = attention(Q W_Q_i, K W_K_i, V W_V_i)

Source: Vaswani et al., "Attention Is All You Need", NeurIPS 2017, https://arxiv.org/abs/1706.03762
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_attention.dropout import new_seed
from fused_attention.functional import attention, attention_weights, attention_with_lse
from fused_attention.rotary import Rotary

from . import cached
from .acceptance import autocasts, can_attend, refuse_call, takes_nested
from .extras import AttentionExtras, add_parameters, attention_options, refuse_script, reset_parameters, turn
from .fused import linear_of
from .heads import add_columns, join_heads, project, split_heads
from .jagged import attend_jagged, takes_jagged
from .masks import add_causal_mask, pad_nested, readable_hint, score_masks


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
    - Jagged nested tensors (batch, jagged, features) are taken without masks, in training too.

    What `attention` cannot take (inputs and weights of different dtypes, strided nested tensors) torch computes;
    what is wrong torch refuses, in its own words. Under TorchScript the module runs torch's functions.

    Beyond torch's, keyword-only; without them the module is torch's in every parameter and every random number drawn:
        head_dim: features of each head, where that is not embed_dim / num_heads, which then need not be whole.
        num_kv_heads: how many heads of keys and values the heads share in groups; it divides num_heads.
        rotary: a `Rotary`, which turns queries and keys by their positions.
        qk_norm: "rms" or "layer", of each head's queries and keys before they are turned, with qk_norm_eps.
        window: (left, right), how many keys before and after its own position a query sees; None is unbounded, is_causal makes right 0.
        softcap, scale: of the scores, as in `attention`. alibi: whether to add ALiBi's slopes times the distance.
        sinks: whether each head has one more logit, a parameter, whose probability goes nowhere.
        qkv_bias, out_bias: whether the projections have a bias, where that is not what `bias` says.
    torch has nothing that computes such a module: what it cannot take is refused in our words, nested tensors and TorchScript too.
    Methods beyond torch's, new_cache, decode, remember and look_up, attend to the keys and values of a cache.
    """

    # Of the class, as a module whose class was changed has not run __init__; a name that users do not give their own attributes.
    _fused_extras: AttentionExtras | None = None
    q_norm: nn.Module
    k_norm: nn.Module
    sinks: nn.Parameter

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        head_dim: int | None = None,
        num_kv_heads: int | None = None,
        rotary: Rotary | None = None,
        qk_norm: Literal["rms", "layer"] | None = None,
        qk_norm_eps: float = 1e-6,
        window: tuple[int | None, int | None] | None = None,
        softcap: float | None = None,
        scale: float | None = None,
        sinks: bool = False,
        alibi: bool = False,
        qkv_bias: bool | None = None,
        out_bias: bool | None = None,
    ) -> None:
        extras = AttentionExtras(
            head_dim, num_kv_heads, rotary, qk_norm, qk_norm_eps, window, softcap, scale, sinks, alibi, qkv_bias, out_bias
        )
        divisor = num_heads if head_dim is None or num_heads < 1 else 1  # torch wants to divide embed_dim among the heads
        super().__init__(embed_dim, divisor, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype)
        if extras.given():
            self.num_heads, self.head_dim = num_heads, embed_dim // num_heads if head_dim is None else head_dim
            extras.check(self)
            self._fused_extras = extras
            add_parameters(self, extras)
            self._reset_parameters()

    def _reset_parameters(self) -> None:
        if self._fused_extras is None:
            super()._reset_parameters()
        else:
            reset_parameters(self, self._fused_extras)

    def extra_repr(self) -> str:
        return "" if self._fused_extras is None else ", ".join(f"{name}={value!r}" for name, value in self._fused_extras.given().items())

    def __prepare_scriptable__(self) -> nn.Module:
        refuse_script(self, self._fused_extras)
        return self

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
        extended = self._fused_extras is not None
        if not can_attend(self, query, key, value, key_padding_mask, need_weights, attn_mask, extended):
            if extended:
                refuse_call(self, query, key, value, key_padding_mask, attn_mask)
            if takes_jagged(self, query, key, value, key_padding_mask, attn_mask):
                return attend_jagged(self, query, key, value, need_weights, average_attn_weights, is_causal)
            return self._torch_forward(query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        if extended and query.dtype is torch.float64 and autocasts(query):
            with torch.autocast(query.device.type, enabled=False):
                return self._attend(query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        return self._attend(query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)

    # With a cache of earlier keys and values, at inference.
    new_cache = cached.new_cache
    decode = cached.decode
    remember = cached.remember
    look_up = cached.look_up

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
        q, k, v = project(self, query, key, value)
        q_norm, k_norm = (None, None) if self._fused_extras is None or self._fused_extras.qk_norm is None else (self.q_norm, self.k_norm)
        q, k, v = split_heads(self, q, q_norm), split_heads(self, k, k_norm), split_heads(self, v)
        if self._fused_extras is not None and self._fused_extras.rotary is not None:
            q, k = turn(q, k, self._fused_extras.rotary)
        k, v, columns = add_columns(self, k, v)
        mask, bias = score_masks(attn_mask, key_padding_mask, self.num_heads, columns)
        dropout_p = float(self.dropout) if self.training else 0.0
        options: dict[str, Any] = {
            "causal": readable_hint(is_causal) if attn_mask is not None and torch.compiler.is_compiling() else bool(is_causal),
            "offset": columns,  # query i sees key i, as in torch; the added columns stand in front, where causal never hides them
            "mask": mask,
            "bias": bias,
            "dropout_p": dropout_p,
            "dropout_seed": new_seed(q.device) if dropout_p > 0.0 else None,
        }
        if self._fused_extras is not None:
            options |= attention_options(self, self._fused_extras, q, options["causal"])
        weights = None
        if need_weights:
            out, lse = attention_with_lse(q, k, v, **options)
            weights = attention_weights(q, k, lse, average_heads=average_attn_weights, **options)
            weights = weights.roll(-columns, -1) if columns else weights  # torch returns the added columns last
            weights = weights if batched else weights.squeeze(0)
        else:
            out = attention(q, k, v, **options)
        return linear_of(self.out_proj, join_heads(self, out, batched)), weights

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
        if query.is_nested and is_causal and takes_nested(self, query, key, value, key_padding_mask, attn_mask):
            return self._attend_nested(query, need_weights, average_attn_weights)
        if is_causal and not query.is_nested and query.dim() in (2, 3) and key.dim() == query.dim():
            seq_dim = 1 if self.batch_first and query.dim() == 3 else 0
            full = (query.shape[seq_dim], key.shape[seq_dim])
            addable = attn_mask is None or attn_mask.dtype is torch.bool or attn_mask.is_floating_point()
            if addable and (attn_mask is None or attn_mask.shape[-2:] == full):
                attn_mask = add_causal_mask(attn_mask, key_padding_mask, query, key, seq_dim)
            is_causal = False  # with the hint torch drops attn_mask, and a wrong one passes unseen
        return super().forward(query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)

    def _attend_nested(self, x: Tensor, need_weights: bool, average_attn_weights: bool) -> tuple[Tensor, Tensor | None]:
        """Causal self-attention of a nested (batch, seqlen, embed_dim), padded meanwhile: torch's operator for it ignores the hint."""
        padded, padding = pad_nested(x)
        out, weights = self._attend(padded, padded, padded, padding, need_weights, None, average_attn_weights, True)
        return torch._nested_tensor_from_mask(out, ~padding, mask_check=False), weights
