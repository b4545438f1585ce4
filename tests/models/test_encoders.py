"""Models that read: BERT, ViT and ViLBERT see what they should and nothing else, and learn what is there to learn."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fused_attention.models import BERT, BERTConfig, Cloze, ViLBERT, ViLBERTConfig, ViT, ViTConfig, hide_words


def fit(model: torch.nn.Module, loss, steps: int, rate: float = 3e-3) -> tuple[float, float]:
    """The loss before and after so many steps of Adam."""
    optimiser = torch.optim.Adam(model.parameters(), lr=rate)
    losses = []
    for _ in range(steps):
        value = loss()
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        losses.append(value.item())
    return losses[0], losses[-1]


def bert() -> BERT:
    torch.manual_seed(0)
    return BERT(BERTConfig(20, context=16, width=16, heads=2, layers=2, feed_forward=32, dropout=0.0)).double().eval()


def test_bert_sees_both_sides_and_no_padding():
    model, tokens = bert(), torch.randint(20, (1, 9))
    hidden = torch.arange(9)[None] >= 7
    out = model(tokens, hidden)
    for place, seen in ((0, True), (6, True), (7, False), (8, False)):
        other = tokens.clone()
        other[0, place] = (other[0, place] + 1) % 20
        assert torch.equal(model(other, hidden)[0, 3], out[0, 3]) is not seen
    torch.testing.assert_close(out[:, :7], model(tokens[:, :7]))


def test_a_text_longer_than_its_positions_is_refused():
    with pytest.raises(ValueError, match="tokens has 17 tokens, and the model has positions for 16"):
        bert()(torch.zeros(1, 17, dtype=torch.long))
    with pytest.raises(ValueError, match="words has 4 tokens, and the model has positions for 3"):
        vilbert()(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, 5))


def test_berts_kinds_tell_segments_apart():
    model, tokens = bert(), torch.randint(20, (1, 9))
    kinds = torch.tensor([[0] * 4 + [1] * 5])
    assert not torch.allclose(model(tokens, kinds=kinds), model(tokens))
    assert torch.equal(model(tokens, kinds=torch.zeros_like(kinds)), model(tokens))


def test_words_are_hidden_in_the_papers_proportions():
    words = torch.randint(3, 20, (200, 500), generator=torch.Generator().manual_seed(1))
    cloze = hide_words(words, mask=2, vocabulary=20, generator=torch.Generator().manual_seed(2))
    count = words.numel()

    def near(share: torch.Tensor, expected: float) -> bool:
        return abs(share.item() / count - expected) < 5 * (expected * (1 - expected) / count) ** 0.5

    assert torch.equal(cloze.words, words)
    assert torch.equal(cloze.tokens[~cloze.asked], words[~cloze.asked])
    masks = cloze.tokens == 2
    assert near(cloze.asked.sum(), 0.15)
    assert near(masks.sum(), 0.15 * (0.8 + 0.1 / 20))
    assert near((cloze.asked & (cloze.tokens == words)).sum(), 0.15 * (0.1 + 0.1 / 20))


def test_berts_loss_is_of_the_words_asked_for():
    model = bert()
    words = torch.randint(20, (2, 9))
    cloze = hide_words(words, mask=2, vocabulary=20, generator=torch.Generator().manual_seed(3))
    log_p = model(cloze.tokens).log_softmax(-1)
    expected = -torch.stack([log_p[b, i, words[b, i]] for b in range(2) for i in range(9) if cloze.asked[b, i]]).mean()
    torch.testing.assert_close(model.loss(cloze), expected)


def test_padding_is_not_asked_for():
    model, words = bert(), torch.randint(3, 20, (2, 9))
    hidden = torch.arange(9) >= torch.tensor([[9], [5]])
    everywhere = Cloze(words, words, torch.ones_like(words, dtype=torch.bool))
    log_p = model(words, hidden).log_softmax(-1)
    expected = -torch.stack([log_p[b, i, words[b, i]] for b in range(2) for i in range(9) if not hidden[b, i]]).mean()
    torch.testing.assert_close(model.loss(everywhere, hidden), expected)
    assert model.loss(everywhere._replace(asked=hidden), hidden) == 0.0  # nothing is left


def test_bert_learns_a_word_from_its_neighbours():
    torch.manual_seed(0)
    model = bert().float().train()
    words = (torch.arange(12) + torch.arange(16)[:, None]) % 18 + 2  # each is one more than the one before
    asked = torch.zeros_like(words, dtype=torch.bool)
    asked[:, 5] = True
    cloze = Cloze(words.masked_fill(asked, 0), words, asked)
    first, last = fit(model, lambda: model.loss(cloze), 120, 1e-2)
    assert last < first / 4


def test_vit_learns_where_a_bright_patch_is():
    torch.manual_seed(0)
    model = ViT(ViTConfig(9, image=9, patch=3, channels=1, width=16, heads=2, layers=1, feed_forward=32))
    places = torch.arange(72) % 9
    images = 0.1 * torch.randn(72, 1, 9, 9)
    images += F.one_hot(places, 9).view(72, 1, 3, 3).repeat_interleave(3, 2).repeat_interleave(3, 3)
    first, last = fit(model, lambda: F.cross_entropy(model(images), places), 80)
    assert last < 0.1 < first


def vilbert() -> ViLBERT:
    torch.manual_seed(0)
    return ViLBERT(ViLBERTConfig(6, 3, regions=4, features=5, width=16, heads=2, text_layers=1, layers=1, feed_forward=32, dropout=0.0))


def test_vilberts_streams_see_each_other_and_no_padding():
    model = vilbert().double().eval()
    words, image = torch.tensor([[3, 4, 0]]), torch.randn(1, 4, 5, dtype=torch.float64)
    hidden = words == 0
    match = model(words, image, hidden)
    assert match.shape == (1,)
    torch.testing.assert_close(model(words[:, :2], image), match)
    assert torch.equal(model(torch.tensor([[3, 4, 5]]), image, hidden), match)
    assert not torch.allclose(model(torch.tensor([[3, 1, 0]]), image, hidden), match)
    states = []
    model.word_layers[-1].register_forward_hook(lambda layer, inputs, out: states.append(out))
    model.region_layers[-1].register_forward_hook(lambda layer, inputs, out: states.append(out))
    for other in ((words, image), (words, image + 1.0), (torch.tensor([[3, 1, 0]]), image)):
        model(*other, hidden)
    assert not torch.allclose(states[0], states[2])  # the words, with another image
    assert not torch.allclose(states[1], states[5])  # the image, with other words


def test_vilbert_learns_which_belong_together():
    model = vilbert()
    images = F.one_hot(torch.arange(4), 5).float()[:, None].expand(-1, 4, -1)
    words = torch.tensor([[2, 0, 0], [3, 0, 0], [4, 0, 0], [5, 0, 0]])
    which, what = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    which, what = which.flatten(), what.flatten()
    together = (which == what).float()

    def loss() -> torch.Tensor:
        return F.binary_cross_entropy_with_logits(model(words[which], images[what], words[which] == 0), together)

    first, last = fit(model, loss, 120)
    assert last < 0.1 < first
