"""Says when a text is longer than what the model was made for."""

import pathlib
import sys

from drlora_jax.interop.hf_files import longest_positions
from drlora_jax.parallel import processes


def warn_beyond(directory: pathlib.Path, tokens: int, what: str) -> bool:
    """Prints one line on standard error if `tokens` are more than the model's positions.

    Args:
      directory: of the model.
      what: has that many tokens; the line begins with it.
    """
    longest = longest_positions(directory)
    if longest is None or tokens <= longest:
        return False
    if processes.is_main():
        print(
            f"warning: {what}: {tokens:,} tokens, more than the model's {longest:,} positions "
            "(max_position_embeddings of its config.json, rope scaling counted); what is computed "
            "beyond them is unreliable.",
            file=sys.stderr,
        )
    return True
