"""How tokens are chosen: drawn within their limits, ended in time, and by beams that find what an exhaustive search finds."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from fused_attention import KVCache, PagedKVCache
from fused_attention.models import GPT, Caches, GPTConfig, Transformer, TransformerConfig, beam_search, generate, stream

P = torch.tensor([0.02, 0.5, 0.08, 0.4])


class Table(nn.Module):
    """Says the same of every token, or what the table says of the one before."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table.expand(table.shape[-1], -1)

    def new_caches(self, batch: int, capacity: int) -> Caches:
        return GPT(GPTConfig(2, 64, 4, 1, 1)).new_caches(batch, capacity)

    def decode(self, tokens: Tensor, caches: Caches, *, last: bool = False) -> Tensor:
        return self.table[tokens].log()


def draws(count: int, **options: float) -> Tensor:
    model = Table(P).eval()
    chosen = generate(model, torch.zeros(count, 1, dtype=torch.long), 1, generator=torch.Generator().manual_seed(5), **options)
    return torch.bincount(chosen.flatten(), minlength=4) / count


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"temperature": 1.0}, P),
        ({"temperature": 0.5}, P**2 / (P**2).sum()),
        ({"temperature": 1.0, "top_k": 3}, torch.tensor([0.0, 0.5, 0.08, 0.4]) / 0.98),
        ({"temperature": 1.0, "top_p": 0.8}, torch.tensor([0.0, 0.5, 0.0, 0.4]) / 0.9),
        ({"temperature": 1.0, "top_p": 0.4}, torch.tensor([0.0, 1.0, 0.0, 0.0])),
        ({"temperature": 1e-40}, torch.tensor([0.0, 1.0, 0.0, 0.0])),
        ({"temperature": 1e-300}, torch.tensor([0.0, 1.0, 0.0, 0.0])),
        ({"temperature": 1.0, "top_p": 0.95, "top_k": 1}, torch.tensor([0.0, 1.0, 0.0, 0.0])),
        ({}, torch.tensor([0.0, 1.0, 0.0, 0.0])),
    ],
    ids=str,
)
def test_draws_follow_the_distribution(options, expected):
    count = 20000
    deviation = (expected * (1 - expected) / count).sqrt()
    assert bool(((draws(count, **options) - expected).abs() <= 5 * deviation).all())


def test_a_member_that_has_ended_says_so_again_and_the_last_ends_the_stream():
    following = torch.full((5, 5), 1e-9)
    for before, after in ((0, 1), (1, 2), (2, 4), (3, 4), (4, 3)):  # 4 is the end; 0 comes to it in three steps, 3 in one
        following[before, after] = 1.0
    steps = list(stream(Table(following).eval(), torch.tensor([[0], [3]]), 10, end=4))
    assert torch.stack(steps, 1).tolist() == [[1, 2, 4], [4, 4, 4]]
    assert generate(Table(following).eval(), torch.tensor([[0], [3]]), 5).tolist() == [[1, 2, 4, 3, 4], [4, 3, 4, 3, 4]]


def small_transformer() -> Transformer:
    torch.manual_seed(2)
    model = Transformer(TransformerConfig(4, 8, 2, 1, 16)).double().eval()
    nn.init.normal_(model.tokens.weight, std=0.7)
    return model


def exhaustive(model: Transformer, source: Tensor, length: int, alpha: float) -> list[tuple[float, tuple[int, ...]]]:
    """Every text of up to `length` tokens that ends with 2 or is that long, with its penalised log probability, best first."""
    found = []
    for size in range(1, length + 1):
        for text in itertools.product(range(4), repeat=size):
            if 2 in text[:-1] or (text[-1] != 2 and size < length):
                continue
            log_p = model(source, torch.tensor([[1, *text[:-1]]]))[0].log_softmax(-1)
            total = sum(log_p[i, token].item() for i, token in enumerate(text))
            found.append((total / ((5 + size) / 6) ** alpha, text))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
def test_wide_beams_find_what_an_exhaustive_search_finds(alpha):
    model, length = small_transformer(), 3
    sources = torch.tensor([[3, 1, 2], [1, 2, 0]])
    with torch.no_grad():
        got = model.translations(sources, length, beams=4**length, length_penalty=alpha)
        for member, source in enumerate((sources[:1], sources[1:, :2])):
            best = exhaustive(model, source, length, alpha)[:12]
            for (score, text), tokens, found in zip(best, got.tokens[member].tolist(), got.scores[member].tolist(), strict=False):
                assert tokens == [*text, *[2] * (length - len(text))]
                assert found == pytest.approx(score, rel=1e-9)


def test_narrow_beams_keep_the_best_of_each_step():
    model = small_transformer()
    source, beams = torch.tensor([[3, 1, 2]]), 3
    kept = [(0.0, ())]
    for _ in range(4):
        grown = []
        for total, text in kept:
            if text and text[-1] == 2:
                grown.append((total, text))
                continue
            log_p = model(source, torch.tensor([[1, *text]]))[0, -1].log_softmax(-1)
            grown += [(total + log_p[token].item(), (*text, token)) for token in range(4)]
        kept = sorted(grown, reverse=True)[:beams]
    got = model.translations(source, 4, beams=beams, length_penalty=0.0)
    assert got.scores[0].tolist() == pytest.approx([score for score, _ in kept], rel=1e-9)
    assert [tuple(tokens) for tokens in got.tokens[0].tolist()] == [(*text, *[2] * (got.tokens.shape[-1] - len(text))) for _, text in kept]


def test_one_beam_is_greedy():
    torch.manual_seed(6)
    model = GPT(GPTConfig(11, 24, 16, 2, 1)).double().eval()
    nn.init.normal_(model.tokens.weight, std=0.5)
    prompt, padding = torch.randint(11, (3, 5)), torch.tensor([0, 2, 4])
    greedy = generate(model, prompt, 8, padding=padding)
    assert torch.equal(beam_search(model, prompt, 8, beams=1, padding=padding).tokens[:, 0], greedy)
    wide = beam_search(model, prompt, 8, beams=4, padding=padding)
    for member, hidden in enumerate(padding.tolist()):
        alone = beam_search(model, prompt[member : member + 1, hidden:], 8, beams=4)
        torch.testing.assert_close(wide.scores[member], alone.scores[0], rtol=1e-5, atol=1e-5)  # log p is fp32
        assert torch.equal(wide.tokens[member], alone.tokens[0])


def long_caches(capacity: int) -> Caches:
    """For more rows than the model below has positions for."""
    return Caches([KVCache(1, capacity, 2, 8)])


def long_pages() -> Caches:
    return Caches([PagedKVCache(1, 12, 2, 8, page_size=4)])


@torch.no_grad()
def pad_what_is_read(model: GPT) -> Tensor:
    caches = model.new_caches(1, 9)
    model.decode(torch.ones(1, 2, dtype=torch.long), caches)
    return generate(model, torch.ones(1, 2, dtype=torch.long), 2, caches=caches, padding=torch.tensor([1]))


def test_a_cache_longer_than_the_context_serves_what_fits():
    model, prompt = GPT(GPTConfig(11, 10, 16, 2, 1)).eval(), torch.ones(1, 7, dtype=torch.long)
    assert torch.equal(generate(model, prompt, 4, caches=long_caches(30)), generate(model, prompt, 4))


@torch.no_grad()
def test_a_full_cache_says_so():
    """Positions past the context are not looked up before the cache refuses the row."""
    model, tokens = GPT(GPTConfig(11, 10, 16, 2, 1)).eval(), torch.ones(1, 10, dtype=torch.long)
    caches = model.new_caches(1, 10)
    model.decode(tokens, caches)
    with pytest.raises(ValueError, match="capacity of 10"):
        model.decode(tokens[:, :1], caches)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda model: generate(model.train(), torch.zeros(1, 1, dtype=torch.long), 3), r"model is in training mode.*model\.eval\(\)"),
        (lambda model: generate(model, torch.zeros(1, 0, dtype=torch.long), 3), r"prompt has shape \(1, 0\).*with a first token"),
        (lambda model: generate(model, torch.zeros(1, 1), 3), r"prompt has shape \(1, 1\), torch.float32"),
        (lambda model: generate(model, torch.zeros(1, 1, dtype=torch.long), 0), "max_new_tokens is 0, expected an int of at least 1"),
        (lambda model: generate(model, torch.zeros(1, 1, dtype=torch.long), 3, top_k=3), "temperature is 0: give a temperature"),
        (lambda model: stream(model, torch.zeros(1, 1, dtype=torch.long), 3, temperature=-1.0), "temperature is -1.0, expected"),
        (lambda model: stream(model, torch.zeros(1, 1, dtype=torch.long), 3, temperature=math.nan), "temperature is nan, expected"),
        (lambda model: generate(model, torch.zeros(1, 1, dtype=torch.long), 3, temperature=1.0, top_k=0), "top_k is 0, expected"),
        (lambda model: generate(model, torch.zeros(1, 1, dtype=torch.long), 3, temperature=1.0, top_p=1.5), "top_p is 1.5, .*at most 1"),
        (lambda model: generate(model, torch.zeros(1, 1, dtype=torch.long), 3, end=-1), "end is -1, expected a token"),
        (lambda model: generate(model, torch.zeros(2, 1, dtype=torch.long), 3, caches=model.new_caches(1, 9)), "batch 2, the caches 1"),
        (lambda model: generate(model, torch.zeros(1, 2, dtype=torch.long), 3, padding=torch.tensor([2])), "padding is .*from 0 to 1"),
        (lambda model: model(torch.zeros(1, 11, dtype=torch.long)), "tokens has 11 tokens, .*positions for 10"),
        (lambda model: small_transformer().encode(torch.ones(1, 1025, dtype=torch.long)), "source has 1025 tokens, .*for 1024"),
        (lambda model: small_transformer()(torch.ones(1, 1, dtype=torch.long), torch.ones(1, 1025, dtype=torch.long)), "target has 1025"),
        (lambda model: generate(model, torch.ones(1, 9, dtype=torch.long), 3, caches=long_caches(12)), "up to 11 rows, .*positions for 10"),
        (lambda model: generate(model, torch.ones(1, 4, dtype=torch.long), 9, caches=long_pages()), "up to 11 rows, .*positions for 10"),
        (lambda model: generate(model, torch.ones(1, 1, dtype=torch.long), 3, end=11), "end is 11, .*a vocabulary of 11"),
        (lambda model: beam_search(model, torch.ones(1, 1, dtype=torch.long), 3, beams=2, end=11), "end is 11, .*a vocabulary of 11"),
        (lambda model: pad_what_is_read(model), "padding is for prompts that begin a text"),
        (lambda model: generate(model, torch.ones(1, 1, dtype=torch.bool), 3), r"prompt has shape \(1, 1\), torch.bool"),
        (lambda model: generate(model, torch.ones(1, 1, dtype=torch.long), 2.5), "max_new_tokens is 2.5, expected an int"),
        (lambda model: generate(model, torch.ones(1, 1, dtype=torch.long), 3, temperature=1.0, top_k=2.5), "top_k is 2.5, expected an int"),
        (lambda model: beam_search(model, torch.ones(1, 1, dtype=torch.long), 3, beams=2.0), "beams is 2.0, expected an int"),
        (lambda model: beam_search(model, torch.zeros(1, 1, dtype=torch.long), 3, beams=0), "beams is 0, expected an int of at least 1"),
        (lambda model: generate(model, torch.zeros(1, 9, dtype=torch.long), 3), "capacity is 11, .*positions for 10 tokens"),
        (lambda model: generate(small_transformer(), torch.zeros(1, 1, dtype=torch.long), 3), r"caches=model\.read\(source, capacity\)"),
    ],
)
def test_what_is_wrong_is_said(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(GPT(GPTConfig(11, 10, 16, 2, 1)).eval())
