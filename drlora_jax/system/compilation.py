"""Keeps compiled programs between runs."""

import jax

from drlora_jax.system.paths import cache_folder


def keep_compiled_programs(platform: str) -> str | None:
    """Turns on jax's compilation cache for an accelerator, unless JAX_COMPILATION_CACHE_DIR does.

    On CPU it stays off: programs are built for one machine's instructions and compile in seconds.
    Returns the directory, None if there is none.
    """
    if jax.config.jax_compilation_cache_dir is None and platform != "cpu":
        jax.config.update("jax_compilation_cache_dir", str(cache_folder("xla")))
    return jax.config.jax_compilation_cache_dir
