"""The text that every Python carries: the sources of its standard library."""

import sysconfig
from pathlib import Path


def corpus(size: int) -> bytes:
    """The first `size` bytes of the standard library's own modules, in the order of their names.

    Raises:
        FileNotFoundError: this Python has no sources beside it.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = bytearray()
    for source in sorted(folder.glob("*.py")):
        text += source.read_bytes()
        if len(text) >= size:
            break
    if not text:
        raise FileNotFoundError(f"{folder} holds no .py sources, and they are the text to learn from: use a Python installed with them")
    return bytes(text[:size])
