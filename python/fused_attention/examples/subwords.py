"""Subwords: frequent words are one token, rare ones are spelled in pieces, and no text is without tokens.

start with characters;  as often as asked for:  the most frequent pair of neighbours becomes one token

Source: Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units", 2016, https://arxiv.org/abs/1508.07909
"""

import heapq
import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable

WORD = re.compile(r" ?\w+| ?[^\w\s]")  # the space in front is part of a word, so that joining tokens gives the text back
SPECIAL = ("<padding>", "<start>", "<end>", "<unknown>")


class Subwords:
    """Tokens learned from texts; the first four are SPECIAL."""

    def __init__(self, texts: Iterable[str], size: int) -> None:
        words = Counter(word for text in texts for word in WORD.findall(text))
        characters = sorted({character for word in words for character in word})
        self.merges: dict[tuple[str, str], int] = {}
        self.tokens = [*SPECIAL, *characters]
        self._learn(words, size)
        self.index = {token: number for number, token in enumerate(self.tokens)}

    def __len__(self) -> int:
        return len(self.tokens)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without start and end."""
        return [self.index.get(piece, 3) for word in WORD.findall(text) for piece in self._pieces(word)]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens up to the end, special ones left out."""
        text = []
        for token in tokens:
            if token == 2:
                break
            if token >= len(SPECIAL):
                text.append(self.tokens[token])
        return "".join(text).strip()

    def _learn(self, words: Counter[str], size: int) -> None:
        pieces = {word: list(word) for word in words}
        counts: Counter[tuple[str, str]] = Counter()
        where: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
        heap: list[tuple[int, tuple[str, str]]] = []  # negative counts, old ones too

        def count(word: str, sign: int) -> None:
            for pair in itertools.pairwise(pieces[word]):
                counts[pair] += sign * words[word]
                where[pair].add(word)
                heapq.heappush(heap, (-counts[pair], pair))

        for word in words:
            count(word, 1)
        while len(self.tokens) < size and heap:
            least, best = heapq.heappop(heap)
            if -least != counts[best]:
                continue
            if counts[best] < 2:
                break
            self.merges[best] = len(self.merges)
            self.tokens.append("".join(best))
            for word in where.pop(best):
                count(word, -1)
                pieces[word] = _merge(pieces[word], best)
                count(word, 1)

    def _pieces(self, word: str) -> list[str]:
        pieces = list(word)
        while len(pieces) > 1:
            best = min(itertools.pairwise(pieces), key=lambda pair: self.merges.get(pair, len(self.merges)))
            if best not in self.merges:
                break
            pieces = _merge(pieces, best)
        return pieces


def _merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    place = 0
    while place < len(pieces):
        if tuple(pieces[place : place + 2]) == pair:
            merged.append(pieces[place] + pieces[place + 1])
            place += 2
        else:
            merged.append(pieces[place])
            place += 1
    return merged
