"""Models of the transformers library as ours: GPT-2, BERT, ViT and Whisper, by renaming their weights.

ours = from_transformers(GPT2LMHeadModel.from_pretrained(...))         gives the same logits
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .bert import BERT, BERTConfig
from .gpt import GPT, GPTConfig
from .vit import ViT, ViTConfig
from .whisper import Whisper, WhisperConfig


def from_transformers(model: Any) -> nn.Module:
    """A GPT, BERT, ViT or Whisper with the weights of a GPT2LMHeadModel, BertForMaskedLM, ViTForImageClassification or
    WhisperForConditionalGeneration, of its dtype, on its device, in evaluation mode.

    Raises:
        NotImplementedError: another kind of model, or one with an option that ours have not; the sentence names it.
    """
    kind = KINDS.get(type(model).__name__)
    if kind is None:
        raise NotImplementedError(f"model is a {type(model).__name__}, expected one of {', '.join(KINDS)}")
    for option, wanted in kind.needs.items():
        wanted = tuple(each(model.config) if callable(each) else each for each in wanted)
        got = getattr(model.config, option, wanted[0])
        if got not in wanted:
            raise NotImplementedError(f"{option} is {got!r} in the model's config, expected {' or '.join(map(repr, wanted))}")
    for one, other in kind.alike:
        if getattr(model.config, one) != getattr(model.config, other):
            numbers = f"{one} is {getattr(model.config, one)}, {other} {getattr(model.config, other)}"
            raise NotImplementedError(f"{numbers} in the model's config: ours has one number for both")
    weights = renamed(model.state_dict(), kind.names, kind.transposed)
    first = next(iter(weights.values()))
    ours = kind.build(model.config).to(first)
    ours.load_state_dict(joined(weights), strict=True)
    return ours.eval()


class Kind(NamedTuple):
    """build: our model of their config. names: patterns of their names and what becomes of them; "" leaves a weight out.

    needs: values that their config may have, or what makes one of it. alike: fields of it that must be equal.
    """

    build: Callable[[Any], nn.Module]
    needs: Mapping[str, tuple[Any, ...]]
    names: Mapping[str, str]
    transposed: str = "$^"
    alike: tuple[tuple[str, str], ...] = ()


def renamed(weights: Mapping[str, Tensor], names: Mapping[str, str], transposed: str) -> dict[str, Tensor]:
    """The weights by our names: of all patterns, in their order, each replaced where it occurs."""
    found = {}
    for theirs, weight in weights.items():
        ours = theirs
        for pattern, name in names.items():
            ours = re.sub(pattern, name, ours)
        if ours:
            found[ours] = weight.T if re.search(transposed, theirs) else weight
    return found


def joined(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Projections of queries, keys and values as one; a bias that one of them lacks (Whisper's keys) is 0."""
    found = {name: weight for name, weight in weights.items() if not re.search(r"_attn\.[qkv]\.", name)}
    for name, q in weights.items():
        if not name.endswith("attn.q.weight"):
            continue
        parts = name.removesuffix("q.weight")
        found[parts + "in_proj_weight"] = torch.cat([weights[f"{parts}{x}.weight"] for x in "qkv"])
        found[parts + "in_proj_bias"] = torch.cat([weights.get(f"{parts}{x}.bias", q.new_zeros(q.shape[0])) for x in "qkv"])
    return found


KINDS = {
    "GPT2LMHeadModel": Kind(
        build=lambda c: GPT(
            GPTConfig(c.vocab_size, c.n_positions, c.n_embd, c.n_head, c.n_layer, c.resid_pdrop, tanh_gelu=c.activation_function != "gelu")
        ),
        needs={
            "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu"),
            "layer_norm_epsilon": (1e-5,),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
            "tie_word_embeddings": (True,),
            "n_inner": (None, lambda c: 4 * c.n_embd),
        },
        names={
            r"^lm_head\..*": "",
            r".*\.attn\.(masked_)?bias$": "",  # causal masks, which older versions saved
            r"^transformer\.": "",
            r"^wte\.": "tokens.",
            r"^wpe\.": "positions.",
            r"^ln_f\.": "norm.",
            r"^h\.": "layers.",
            r"\.ln_(\d)\.": r".norm\1.",
            r"\.attn\.c_attn\.(weight|bias)": r".self_attn.in_proj_\1",
            r"\.attn\.c_proj\.": ".self_attn.out_proj.",
            r"\.mlp\.c_fc\.": ".linear1.",
            r"\.mlp\.c_proj\.": ".linear2.",
        },
        transposed=r"\.c_(attn|proj|fc)\.weight$",  # its layers are x W + b, with W lying as it is multiplied
    ),
    "BertForMaskedLM": Kind(
        build=lambda c: BERT(
            BERTConfig(
                c.vocab_size,
                c.max_position_embeddings,
                c.hidden_size,
                c.num_attention_heads,
                c.num_hidden_layers,
                c.intermediate_size,
                c.type_vocab_size,
                c.hidden_dropout_prob,
                c.layer_norm_eps,
            )
        ),
        needs={
            "hidden_act": ("gelu",),
            "is_decoder": (False,),
            "add_cross_attention": (False,),
            "position_embedding_type": ("absolute",),
            "tie_word_embeddings": (True,),
        },
        names={
            r"^cls\.predictions\.decoder\..*": "",
            r"^cls\.predictions\.bias": "head_bias",
            r"^cls\.predictions\.transform\.dense\.": "head.",
            r"^cls\.predictions\.transform\.LayerNorm\.": "head_norm.",
            r"^bert\.embeddings\.word_embeddings\.": "tokens.",
            r"^bert\.embeddings\.position_embeddings\.": "positions.",
            r"^bert\.embeddings\.token_type_embeddings\.": "kinds.",
            r"^bert\.embeddings\.LayerNorm\.": "norm.",
            r"^bert\.embeddings\.position_ids$": "",
            r"^bert\.encoder\.layer\.": "layers.",
            r"\.attention\.self\.(q|k|v)\w+\.": r".self_attn.\1.",
            r"\.attention\.output\.dense\.": ".self_attn.out_proj.",
            r"\.attention\.output\.LayerNorm\.": ".norm1.",
            r"\.intermediate\.dense\.": ".linear1.",
            r"\.output\.dense\.": ".linear2.",
            r"\.output\.LayerNorm\.": ".norm2.",
        },
    ),
    "ViTForImageClassification": Kind(
        build=lambda c: ViT(
            ViTConfig(
                c.num_labels,
                c.image_size,
                c.patch_size,
                c.num_channels,
                c.hidden_size,
                c.num_attention_heads,
                c.num_hidden_layers,
                c.intermediate_size,
                c.hidden_dropout_prob,
                c.layer_norm_eps,
            )
        ),
        needs={"hidden_act": ("gelu",)},
        names={
            r"^classifier\.": "head.",
            r"^vit\.layernorm\.": "norm.",
            r"^vit\.embeddings\.cls_token": "first",
            r"^vit\.embeddings\.position_embeddings": "positions",
            r"^vit\.embeddings\.patch_embeddings\.projection\.": "patches.",
            r"^vit\.(encoder\.)?layers?\.": "layers.",
            r"\.attention\.attention\.(q|k|v)\w+\.": r".self_attn.\1.",
            r"\.attention\.([qkv])_proj\.": r".self_attn.\1.",
            r"\.attention\.(output\.dense|o_proj)\.": ".self_attn.out_proj.",
            r"\.layernorm_before\.": ".norm1.",
            r"\.layernorm_after\.": ".norm2.",
            r"\.intermediate\.dense\.": ".linear1.",
            r"\.output\.dense\.": ".linear2.",
            r"\.mlp\.fc1\.": ".linear1.",
            r"\.mlp\.fc2\.": ".linear2.",
        },
    ),
    "WhisperForConditionalGeneration": Kind(
        build=lambda c: Whisper(
            WhisperConfig(
                c.vocab_size,
                c.num_mel_bins,
                c.max_source_positions,
                c.max_target_positions,
                c.d_model,
                c.encoder_attention_heads,
                c.encoder_layers,
                c.decoder_layers,
                c.encoder_ffn_dim,
                c.dropout,
            )
        ),
        needs={"activation_function": ("gelu",), "scale_embedding": (False,), "tie_word_embeddings": (True,)},
        alike=(("encoder_attention_heads", "decoder_attention_heads"), ("encoder_ffn_dim", "decoder_ffn_dim")),
        names={
            r"^proj_out\..*": "",
            r"^model\.encoder\.embed_positions\.weight": "sinusoids",
            r"^model\.decoder\.embed_tokens\.": "tokens.",
            r"^model\.decoder\.embed_positions\.weight": "positions",
            r"^model\.encoder\.layer_norm\.": "encoder_norm.",
            r"^model\.decoder\.layer_norm\.": "norm.",
            r"^model\.encoder\.conv": "conv",
            r"^model\.(en|de)coder\.layers\.": r"\1coder.",
            r"\.([qkv])_proj\.": r".\1.",
            r"\.encoder_attn\.": ".multihead_attn.",
            r"\.self_attn_layer_norm\.": ".norm1.",
            r"^encoder\.(\d+)\.final_layer_norm\.": r"encoder.\1.norm2.",
            r"\.encoder_attn_layer_norm\.": ".norm2.",
            r"\.final_layer_norm\.": ".norm3.",
            r"\.fc1\.": ".linear1.",
            r"\.fc2\.": ".linear2.",
        },
    ),
}
