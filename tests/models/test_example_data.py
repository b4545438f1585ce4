"""What the examples learn from: catalogues read as gettext defines them, subwords that give the text back, digits that sound as dialled."""

from __future__ import annotations

import random
import struct
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("rich", reason="rich is not installed: pip install fused-attention[examples]")

from fused_attention.examples import catalogues, speech, standard_library, subwords, vit

MESSAGES = {
    "": "Content-Type: text/plain; charset=UTF-8\n",
    "Save": "Enregistrer",
    "month\4May": "mai",
    "one day\0%d days": "un jour\0%d jours",
    "Are you\nsure?": "Êtes-vous sûr\u00a0?",
    "<b>Bold</b>": "<b>Gras</b>",
    "{count} files": "{count} fichiers",
    "OK": "OK",
    "A long message " * 9: "Un long message",
    "not translated": "",
}


def catalogue(order: str, messages: dict[str, str]) -> bytes:
    """A .mo file: a header, the two tables, the texts with a zero behind each."""
    count, start = len(messages), 28 + 16 * len(messages)
    texts, tables = b"", []
    for side in (list(messages), list(messages.values())):
        table = b""
        for text in side:
            data = text.encode()
            table += struct.pack(order + "2I", len(data), start + len(texts))
            texts += data + b"\0"
        tables.append(table)
    return struct.pack(order + "7I", 0x950412DE, 0, count, 28, 28 + 8 * count, 0, 0) + tables[0] + tables[1] + texts


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_catalogue_is_read_in_both_byte_orders(order):
    read = dict(catalogues.read_catalogue(catalogue(order, MESSAGES)))
    assert read["Save"] == "Enregistrer"
    assert read["May"] == "mai"  # without its context
    assert read["one day"] == "un jour"  # the first of its plural forms
    assert len(read) == len(MESSAGES)


def test_messages_are_found_in_folders_and_wheels(tmp_path):
    data = catalogue("<", MESSAGES)
    folder = tmp_path / "package/locale/fr/LC_MESSAGES"
    folder.mkdir(parents=True)
    (folder / "django.mo").write_bytes(data)
    wheel = tmp_path / "some.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("some/locale/fr_FR/LC_MESSAGES/messages.mo", data)
        file.writestr("some/locale/de/LC_MESSAGES/messages.mo", catalogue("<", {"German": "deutsch"}))
    expected = [("Are you sure?", "Êtes-vous sûr ?"), ("May", "mai"), ("Save", "Enregistrer"), ("one day", "un jour")]
    for paths in ([tmp_path / "package"], [wheel], [wheel, tmp_path / "package"]):
        assert [tuple(pair) for pair in catalogues.pairs(paths, "fr", 60)] == expected
    with pytest.raises(FileNotFoundError, match="holds no it catalogue"):
        catalogues.pairs([wheel], "it", 60)
    with pytest.raises(FileNotFoundError, match="neither a folder nor a wheel"):
        catalogues.pairs([Path("nowhere.whl")], "fr", 60)


@pytest.mark.parametrize("data", [b"", b"nonsense" * 9])
def test_what_is_no_catalogue_is_refused(data):
    with pytest.raises(ValueError, match=r"expected a \.mo file"):
        list(catalogues.read_catalogue(data))


def test_the_most_frequent_neighbours_are_joined():
    """The example of the paper: after low, lower, newest and widest, "est" is a piece."""
    text = ["low"] * 5 + ["lower"] * 2 + ["newest"] * 6 + ["widest"] * 3
    learned = subwords.Subwords(text, 200)
    assert [learned.tokens[token] for token in learned.encode("lowest")] == ["low", "est"]
    pairs = list(learned.merges)
    assert set(pairs[:2]) <= {("e", "s"), ("s", "t"), ("es", "t"), ("e", "st")}


def test_subwords_give_the_text_back():
    draw = random.Random(1)
    texts = [" ".join("".join(draw.choices("abcdé", k=draw.randint(1, 6))) for _ in range(8)) + "." for _ in range(60)]
    learned = subwords.Subwords(texts[:40], 80)
    assert len(learned) == 80
    assert all(learned.decode(learned.encode(text)) == text for text in texts)
    assert learned.decode([1, *learned.encode(texts[0]), 2, 7, 8]) == texts[0]
    assert learned.encode("\N{SNOWMAN}") == [3]


def test_an_image_moves_by_a_pixel_at_most():
    images = torch.rand(50, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    moved = vit.shifted(images, torch.Generator().manual_seed(1), share=0.5)
    padded = F.pad(images, (1, 1, 1, 1))
    found = torch.zeros(50, 9, dtype=torch.bool)
    for place in range(9):
        down, right = divmod(place, 3)
        found[:, place] = (padded[:, :, down : down + 8, right : right + 8] == moved).all((1, 2, 3))
    assert bool((found.sum(1) == 1).all())
    assert bool(found.any(0).all())
    assert torch.equal(vit.shifted(images, torch.Generator().manual_seed(1), share=0.0), images)


@pytest.mark.parametrize("digit", range(10))
def test_a_dialled_digit_has_the_two_tones_of_its_key(digit):
    rows, columns = (697, 770, 852, 941), (1209, 1336, 1477)
    place = 10 if digit == 0 else digit - 1  # of a telephone's keys, 0 stands below 8
    sound = speech.dial(digit, torch.Generator().manual_seed(digit))
    power = torch.fft.rfft(sound, 16000).abs()  # a bin every hertz
    loudest = [max(tones, key=lambda hertz: power[hertz].item()) for tones in (rows, columns)]
    assert loudest == [rows[place // 3], columns[place % 3]]
    assert 0.06 * 16000 <= len(sound) <= 0.3 * 16000


def test_numbers_are_said_in_order():
    """Silence between the digits, each of which is a sound of its own length."""

    def say(digit: int, generator: torch.Generator) -> torch.Tensor:
        return torch.full((500 + 100 * digit,), 10.0)

    heard = speech.speak(say, torch.Generator().manual_seed(3), 20, "cpu")
    assert heard.mels.shape == (20, speech.MELS, speech.FRAMES)
    for row in heard.tokens.tolist():
        assert row[0] == speech.START
        text = speech.digits(row[1:])
        assert 1 <= len(text) <= speech.MOST_DIGITS
        assert row[1 : len(text) + 2] == [*(speech.ZERO + int(digit) for digit in text), speech.END]
        assert set(row[len(text) + 2 :]) <= {speech.PADDING}
    assert len({tuple(row) for row in heard.tokens.tolist()}) > 15


def test_the_standard_library_has_text():
    assert standard_library.corpus(100_000).count(b"def ") > 100
    assert len(standard_library.corpus(1000)) == 1000
