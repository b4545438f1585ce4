"""Sentences and their translations from the gettext catalogues that programs carry: LC_MESSAGES/*.mo, in folders and in wheels.

A catalogue is a table of message identifiers, which are the English texts, and a table of their translations.
Source: the GNU gettext manual, "The Format of GNU MO Files"
"""

import re
import struct
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

MAGIC = 0x950412DE


class Pair(NamedTuple):
    """A text and its translation."""

    source: str
    target: str


def pairs(paths: Iterable[Path], language: str, longest: int) -> list[Pair]:
    """Pairs of different sources, sorted: plain sentences of one line, of up to `longest` characters each, without markup.

    Raises:
        FileNotFoundError: there are none.
    """
    found = {}
    for path in paths:
        for catalogue in _catalogues(path, language):
            for source, target in read_catalogue(catalogue):
                plain = Pair(_plain(source), _plain(target))
                if all(_is_sentence(text, longest) for text in plain) and plain.source != plain.target:
                    found[plain.source] = plain.target
    if not found:
        given = ", ".join(map(str, paths)) or "no path"
        raise FileNotFoundError(f"{given} holds no {language} catalogue: give wheels that do, such as those of django, pretix and indico")
    return [Pair(source, found[source]) for source in sorted(found)]


def read_catalogue(data: bytes) -> Iterator[Pair]:
    """The messages of a .mo file; of those with plural forms the first."""
    order = "<" if len(data) >= 20 and struct.unpack_from("<I", data)[0] == MAGIC else ">"
    if len(data) < 20 or struct.unpack_from(order + "I", data)[0] != MAGIC:
        raise ValueError(f"a catalogue begins with {data[:4].hex()}, expected a .mo file, which begins with {MAGIC:x} in either byte order")
    count, sources, targets = struct.unpack_from(order + "8x3I", data)
    for row in range(count):
        texts = []
        for table in (sources, targets):
            length, start = struct.unpack_from(order + "2I", data, table + 8 * row)
            texts.append(data[start : start + length].split(b"\0")[0].decode("utf-8", "replace"))
        yield Pair(texts[0].rpartition("\4")[2], texts[1])  # a context ends with the character 4


def _catalogues(path: Path, language: str) -> Iterator[bytes]:
    """Of a language, in a folder or in a wheel."""
    wanted = re.compile(rf"(^|/){language}(_[A-Z]+)?/LC_MESSAGES/[^/]+\.mo$")
    if path.is_dir():
        yield from (file.read_bytes() for file in sorted(path.rglob("*.mo")) if wanted.search(file.as_posix()))
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as wheel:
            yield from (wheel.read(name) for name in sorted(wheel.namelist()) if wanted.search(name))
    else:
        raise FileNotFoundError(f"{path} is neither a folder nor a wheel: give what holds LC_MESSAGES/*.mo")


def _plain(text: str) -> str:
    # Non-breaking spaces stand before French punctuation in some catalogues and not in others.
    return " ".join(text.replace("\u00a0", " ").replace("\u202f", " ").replace("’", "'").split())


def _is_sentence(text: str, longest: int) -> bool:
    return 2 <= len(text) <= longest and re.search(r"[<>{}%\\|_=]|https?:", text) is None and re.search(r"[^\W\d_]{2}", text) is not None
