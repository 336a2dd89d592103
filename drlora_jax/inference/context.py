"""Warns when a text is longer than the model supports."""

import pathlib
import sys

from drlora_jax.interop.hf_files import longest_positions
from drlora_jax.parallel import processes


def warn_beyond(directory: pathlib.Path, tokens: int, what: str) -> bool:
    """Prints one line on standard error if `tokens` exceeds the model's positions; returns whether
    it does.

    Args:
      directory: Directory of the model.
      what: Names the text that has that many tokens; the line begins with it.
    """
    longest = longest_positions(directory)
    if longest is None or tokens <= longest:
        return False
    if processes.is_main():
        print(
            f"warning: {what}: {tokens:,} tokens, more than the model's {longest:,} positions "
            "(max_position_embeddings of its config.json, with rope scaling); results beyond them "
            "are unreliable.",
            file=sys.stderr,
        )
    return True
