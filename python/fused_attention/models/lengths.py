"""How long a text may be: of as many tokens as the model has positions for."""

from torch import Tensor


def check_length(name: str, tokens: Tensor, most: int) -> None:
    """A ValueError for tokens (batch, seqlen) with a seqlen above `most`."""
    if tokens.shape[1] > most:
        raise ValueError(f"{name} has {tokens.shape[1]} tokens, and the model has positions for {most}: shorten the text")
