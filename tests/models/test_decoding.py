"""Models that write: with a cache, token by token, they say what they say of the whole text at once.

logits(decode, rows n ... m) = logits(forward)[n ... m]        loss(teacher forcing) = mean of -log p(token) step by step
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from fused_attention.models import GPT, Caches, GPTConfig, Transformer, TransformerConfig, beam_search, generate, warm_up
from fused_attention.paging import PagedKVCache

VOCABULARY = 13


def gpt() -> GPT:
    torch.manual_seed(3)
    model = GPT(GPTConfig(VOCABULARY, 24, 16, 2, 2, tanh_gelu=True)).double().eval()
    for parameter in model.parameters():  # of a size that makes the tokens differ
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def transformer(**options: int) -> Transformer:
    torch.manual_seed(4)
    return Transformer(TransformerConfig(VOCABULARY, 16, 2, 2, 32, **options)).double().eval()


SOURCE = torch.tensor([[5, 6, 7, 8, 2], [9, 4, 2, 0, 0], [3, 2, 0, 0, 0]])
TARGET = torch.tensor([[4, 5, 9, 11, 2, 0, 0], [6, 2, 0, 0, 0, 0, 0], [7, 7, 8, 8, 9, 9, 2]])
PARTS = (0, 3, 4, 5, 7)


def in_parts(model: GPT | Transformer, tokens: torch.Tensor, caches: Caches) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model.decode(tokens[:, a:b], caches) for a, b in itertools.pairwise(PARTS)], 1)


def paged(caches: Caches) -> Caches:
    """The same, empty, in pages of three rows."""
    return Caches([PagedKVCache(x.batch, 12, x.kv_heads, x.head_dim, page_size=3, dtype=x.dtype) for x in caches.text], caches.memory)


@pytest.mark.parametrize("kind", [lambda caches: caches, paged], ids=["contiguous", "paged"])
def test_gpt_decodes_what_its_forward_says(kind):
    model, tokens = gpt(), torch.randint(VOCABULARY, (3, 7))
    torch.testing.assert_close(in_parts(model, tokens, kind(model.new_caches(3, 9))), model(tokens).detach())


@pytest.mark.parametrize("kind", [lambda caches: caches, paged], ids=["contiguous", "paged"])
def test_transformer_decodes_what_its_forward_says(kind):
    model = transformer()
    torch.testing.assert_close(in_parts(model, TARGET, kind(model.read(SOURCE, 7))), model(SOURCE, TARGET).detach())


def test_beams_share_pages():
    model = gpt()
    prompt = torch.randint(VOCABULARY, (3, 5))
    expected = beam_search(model, prompt, 6, beams=3)
    pages = Caches([PagedKVCache(3, 60, 2, 8, page_size=3, dtype=torch.float64) for _ in range(2)])
    got = beam_search(model, prompt, 6, beams=3, caches=pages)
    assert torch.equal(got.tokens, expected.tokens)
    torch.testing.assert_close(got.scores, expected.scores)


def test_left_padding_changes_nothing():
    model = gpt()
    alone = [torch.randint(VOCABULARY, (1, length)) for length in (7, 4, 1)]
    padding = torch.tensor([0, 3, 6])
    batch = torch.cat([F.pad(text, (7 - text.shape[1], 0), value=5) for text in alone])
    caches = model.new_caches(3, 12)
    caches.pad_left(padding)
    with torch.no_grad():
        whole, parts = model(batch, padding), in_parts(model, batch, caches)
        for member, text in enumerate(alone):
            expected = model(text)[0]
            torch.testing.assert_close(whole[member, padding[member] :], expected)
            torch.testing.assert_close(parts[member, padding[member] :], expected)
    together = generate(model, batch, 5, padding=padding)
    assert torch.equal(together, torch.cat([generate(model, text, 5) for text in alone]))


def test_padding_of_the_source_changes_nothing():
    model = transformer()
    alone = [SOURCE[member : member + 1, :length] for member, length in enumerate((5, 3, 2))]
    with torch.no_grad():
        together = model(SOURCE, TARGET)
        for member, source in enumerate(alone):
            torch.testing.assert_close(together[member], model(source, TARGET[member : member + 1])[0])
    translated = model.translate(SOURCE, 6)
    for member, source in enumerate(alone):
        written = model.translate(source, 6)
        assert torch.equal(translated[member, : written.shape[1]], written[0])


def test_only_what_stands_behind_a_source_is_padding():
    """The forward hid the token wherever it stood, and decoding took as many rows from the left as there were other tokens."""
    model = transformer()
    odd = torch.tensor([[0, 0, 5, 6, 2], [5, 0, 7, 2, 0], [3, 2, 0, 0, 0]])
    torch.testing.assert_close(in_parts(model, TARGET, model.read(odd, 7)), model(odd, TARGET).detach())
    assert not torch.allclose(model(odd, TARGET)[0], model(odd[:, 2:], TARGET)[0])


@torch.no_grad()
def test_the_last_logits_alone_are_those_of_the_last_token():
    model, tokens = gpt(), torch.randint(VOCABULARY, (3, 7))
    torch.testing.assert_close(model.decode(tokens, model.new_caches(3, 7), last=True), model(tokens)[:, -1:])
    translator = transformer()
    torch.testing.assert_close(translator.decode(TARGET, translator.read(SOURCE, 7), last=True), translator(SOURCE, TARGET)[:, -1:])


def test_a_source_is_projected_once():
    """The keys and values of the memory are in the caches: weights that make them are not read again."""
    model = transformer()
    expected = model(SOURCE, TARGET).detach()
    caches = model.read(SOURCE, 7)
    for layer in model.decoder:
        layer.multihead_attn.in_proj_weight.data[16:] = float("nan")
    torch.testing.assert_close(in_parts(model, TARGET, caches), expected)


def test_teacher_forcing_equals_the_loss_step_by_step():
    model = transformer()
    losses = []
    for source, target in zip(SOURCE, TARGET, strict=True):
        caches = model.read(source[None], 7)
        before = 1  # start
        for token in target.tolist():
            if token == 0:
                break
            with torch.no_grad():
                losses.append(-model.decode(torch.tensor([[before]]), caches)[0, -1].log_softmax(-1)[token])
            before = token
    torch.testing.assert_close(model.loss(SOURCE, TARGET, label_smoothing=0.0), torch.stack(losses).mean())


def test_label_smoothing_gives_every_token_its_share():
    model = transformer()
    log_p = model(SOURCE, F.pad(TARGET[:, :-1], (1, 0), value=1)).log_softmax(-1)[TARGET != 0]
    truth = TARGET[TARGET != 0]
    smoothed = -(0.9 * log_p[torch.arange(len(truth)), truth] + 0.1 * log_p.mean(-1)).mean()
    torch.testing.assert_close(model.loss(SOURCE, TARGET), smoothed)


def test_gpt_loss_is_of_the_next_token():
    model, tokens = gpt(), torch.randint(VOCABULARY, (2, 8))
    log_p = model(tokens[:, :-1]).log_softmax(-1)
    expected = -torch.stack([log_p[b, i, tokens[b, i + 1]] for b in range(2) for i in range(7)]).mean()
    torch.testing.assert_close(model.loss(tokens), expected)


def test_the_models_learn_with_their_schedule():
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(VOCABULARY, 16, 2, 1, 32, dropout=0.0))
    optimiser = torch.optim.Adam(model.parameters(), lr=1.0, betas=(0.9, 0.98), eps=1e-9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: warm_up(step + 1, 16, 60))
    losses = []
    for _ in range(150):
        loss = model.loss(SOURCE, TARGET, label_smoothing=0.0)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 < losses[0]
    model.eval()
    written = model.translate(SOURCE, 7)
    assert [row[: row.index(2)] for row in written.tolist()] == [row[: row.index(2)] for row in TARGET.tolist()]


def test_the_rate_rises_then_falls():
    rates = [warm_up(step, 512) for step in (1, 2000, 4000, 16000)]
    assert rates == [512**-0.5 * rate for rate in (4000**-1.5, 2000 * 4000**-1.5, 4000**-0.5, 16000**-0.5)]
