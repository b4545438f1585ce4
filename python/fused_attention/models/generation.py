"""Text from a decoder with a cache, a token at a time: greedy, sampled, or by beam search.

    greedy:  token = argmax(logits)            sampled:  token ~ softmax(logits / temperature) within top_k and top_p
    beams:   the hypotheses with the largest  log p(tokens) / ((5 + length) / 6)^length_penalty

Sources: top-p, Holtzman et al., 2020, https://arxiv.org/abs/1904.09751; the beams' penalty, Wu et al., 2016, https://arxiv.org/abs/1609.08144
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .caches import Caches


class Decoder(Protocol):
    """What generates: `GPT`, `Transformer` and `Whisper` do; those that need no source have new_caches(batch, capacity) too."""

    def decode(self, tokens: Tensor, caches: Caches, *, last: bool = False) -> Tensor:
        """tokens (batch, seqlen) that follow those in the caches -> logits (batch, seqlen, vocabulary), or of the last one alone."""
        ...


class Hypotheses(NamedTuple):
    """tokens: (batch, beams, length), best first, `end` behind the end; scores: (batch, beams), the penalised log probabilities.

    Beams for which there were not as many different texts have the score -inf, and tokens that say nothing.
    """

    tokens: Tensor
    scores: Tensor


def generate(model: Decoder, prompt: Tensor, max_new_tokens: int, **options: Any) -> Tensor:
    """What follows the prompt, int64 (batch, at most max_new_tokens), `end` behind a member's end; arguments and errors are `stream`'s."""
    return torch.stack(list(stream(model, prompt, max_new_tokens, **options)), 1)


def stream(
    model: Decoder,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    caches: Caches | None = None,
    padding: Tensor | None = None,
    end: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """The tokens (batch,) that follow the prompt, one step after the other, until every member has ended.

    Args:
        model: in evaluation mode.
        prompt: int64 (batch, seqlen), seqlen at least 1.
        caches: what the model has read before the prompt, of a capacity for all new rows; None for nothing.
        padding: int (batch,), how many tokens on the left of each prompt are none, where prompts have lengths of their own.
        end: the token that ends a text, which is the last to come; a member that has ended gives it again.
        temperature: 0 takes the likeliest token; above, tokens are drawn from the logits divided by it.
        top_k, top_p: draw from the top_k likeliest tokens, or from the likeliest whose probabilities reach top_p together.

    Raises:
        ValueError: an argument is out of range, or the model is in training mode.
    """
    _check(model, prompt, max_new_tokens, end)
    if not 0.0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}, expected a finite number of at least 0")
    if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"top_k is {top_k}, expected an int of at least 1, or None for all tokens")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p is {top_p}, expected a number above 0 and at most 1, or None for all tokens")
    if temperature == 0.0 and (top_k is not None or top_p is not None):
        raise ValueError("top_k and top_p choose among tokens that are drawn, and temperature is 0: give a temperature such as 1.0")
    caches = _caches(model, prompt, max_new_tokens, caches, padding)
    return _stream(model, prompt, max_new_tokens, caches, end, lambda logits: _choose(logits, temperature, top_k, top_p, generator))


@torch.no_grad()
def beam_search(
    model: Decoder,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    beams: int,
    caches: Caches | None = None,
    padding: Tensor | None = None,
    end: int | None = None,
    length_penalty: float = 0.0,
) -> Hypotheses:
    """The likeliest texts that follow the prompt among those whose beginnings were among the `beams` likeliest at each step.

    With length_penalty 0 log probabilities are compared as they are, which favours short texts. The other arguments are `stream`'s.
    """
    _check(model, prompt, max_new_tokens, end)
    if not isinstance(beams, int) or beams < 1:
        raise ValueError(f"beams is {beams}, expected an int of at least 1")
    batch = prompt.shape[0]
    caches = _caches(model, prompt, max_new_tokens, caches, padding)
    log_p = _log_p(model.decode(prompt, caches, last=True)).repeat_interleave(beams, 0)
    _check_end(end, log_p.shape[-1])
    caches.repeat(beams)
    tokens = prompt.new_empty(batch, beams, 0)
    lengths = prompt.new_zeros(batch, beams)
    ended = torch.zeros_like(lengths, dtype=torch.bool)
    # All beams begin alike: but for the first, their continuations would be copies.
    totals = log_p.new_full((batch, beams), float("-inf"))
    totals[:, 0] = 0.0
    first_beam = torch.arange(batch, device=prompt.device)[:, None] * beams
    for step in range(max_new_tokens):
        if step:
            log_p = _log_p(model.decode(tokens[:, :, -1].reshape(-1, 1), caches, last=True))
        candidates = log_p.view(batch, beams, -1)
        vocabulary = candidates.shape[-1]
        if end is not None:
            stays = torch.full_like(candidates[0, 0], float("-inf"))
            stays[end] = 0.0
            candidates = torch.where(ended[..., None], stays, candidates)
        candidates, lengths = candidates + totals[..., None], lengths + ~ended
        best = _penalised(candidates, lengths[..., None], length_penalty).flatten(1).topk(beams).indices
        parents, chosen = best // vocabulary, best % vocabulary
        totals, lengths = candidates.flatten(1).gather(1, best), lengths.gather(1, parents)
        tokens = torch.cat([tokens.gather(1, parents[..., None].expand(-1, -1, step)), chosen[..., None]], -1)
        ended = ended.gather(1, parents) if end is None else ended.gather(1, parents) | (chosen == end)
        if step + 1 == max_new_tokens or (end is not None and bool(ended.all())):
            break
        caches.reorder((first_beam + parents).flatten())
    return Hypotheses(tokens, _penalised(totals, lengths, length_penalty))


@torch.no_grad()
def _stream(
    model: Decoder, rows: Tensor, max_new_tokens: int, caches: Caches, end: int | None, choose: Callable[[Tensor], Tensor]
) -> Iterator[Tensor]:
    ended = torch.zeros(rows.shape[0], dtype=torch.bool, device=rows.device)
    for _ in range(max_new_tokens):
        logits = model.decode(rows, caches, last=True)[:, -1]
        _check_end(end, logits.shape[-1])
        chosen = choose(logits.float())
        if end is not None:
            chosen = chosen.masked_fill(ended, end)
            ended = ended | (chosen == end)
        yield chosen
        if end is not None and bool(ended.all()):
            return
        rows = chosen[:, None]


def _choose(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None) -> Tensor:
    """A token (batch,) of each member's logits (batch, vocabulary)."""
    if temperature == 0.0:
        return logits.argmax(-1)
    # Below the smallest normal number temperatures are 0 on some devices, and 0 / 0 is no distribution.
    below = (logits - logits.amax(-1, keepdim=True)) / max(temperature, torch.finfo(logits.dtype).tiny)
    p, order = below.softmax(-1).sort(-1, descending=True)
    hidden = torch.zeros_like(p, dtype=torch.bool)
    if top_k is not None:
        hidden[:, top_k:] = True
    if top_p is not None:
        hidden |= p.cumsum(-1) - p >= top_p  # what stands before a token alone reaches top_p
    drawn = torch.multinomial(p.masked_fill(hidden, 0.0), 1, generator=generator)
    return order.gather(-1, drawn).squeeze(-1)


def _log_p(logits: Tensor) -> Tensor:
    logits = logits[:, -1]
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _penalised(totals: Tensor, lengths: Tensor, length_penalty: float) -> Tensor:
    return totals / ((5 + lengths.to(totals.dtype)) / 6) ** length_penalty


def _caches(model: Decoder, prompt: Tensor, max_new_tokens: int, caches: Caches | None, padding: Tensor | None) -> Caches:
    if caches is None:
        if not hasattr(model, "new_caches"):
            raise ValueError(f"caches is None, {type(model).__name__} writes about a source: give caches=model.read(source, capacity)")
        fresh: Caches = model.new_caches(prompt.shape[0], prompt.shape[1] + max_new_tokens - 1)  # the last token is never read
        caches = fresh
    elif padding is not None and caches.text[0].bound > 0:
        raise ValueError("padding is for prompts that begin a text, and these follow what the caches hold: use caches.pad_left before both")
    batch, seqlen = prompt.shape
    if caches.text[0].batch != batch:
        raise ValueError(f"prompt has batch {batch}, the caches {caches.text[0].batch}: they must be equal")
    if padding is not None:
        # Values on a device are not read: that would wait for it.
        fits = padding.device.type != "cpu" or bool(((padding >= 0) & (padding < seqlen)).all())
        if padding.shape != (batch,) or not fits:
            raise ValueError(f"padding is {padding}, expected ({batch},) numbers from 0 to {seqlen - 1}: each prompt needs a token")
        caches.pad_left(padding)
    return caches


def _check(model: Decoder, prompt: Tensor, max_new_tokens: int, end: int | None) -> None:
    if prompt.dim() != 2 or prompt.shape[1] == 0 or prompt.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"prompt has shape {tuple(prompt.shape)}, {prompt.dtype}, expected int64 (batch, seqlen) with a first token")
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, expected an int of at least 1")
    if end is not None and end < 0:
        raise ValueError(f"end is {end}, expected a token of the vocabulary, or None for texts without an end")
    if isinstance(model, nn.Module) and model.training:
        raise ValueError("model is in training mode, where dropout changes what it says: call model.eval() first")


def _check_end(end: int | None, vocabulary: int) -> None:
    if end is not None and end >= vocabulary:
        raise ValueError(f"end is {end}, and the model has a vocabulary of {vocabulary}: give its token, or None for texts without an end")
