"""Where compiled programs are kept between runs."""

import jax

from drlora_jax.system.paths import cache_folder


def keep_compiled_programs(platform: str) -> str | None:
    """Turns jax's compilation cache on for an accelerator, unless JAX_COMPILATION_CACHE_DIR has.

    Not on CPU, where programs are for one machine's instructions and compile in seconds. Returns
    the directory, None if there is none.
    """
    if jax.config.jax_compilation_cache_dir is None and platform != "cpu":
        jax.config.update("jax_compilation_cache_dir", str(cache_folder("xla")))
    return jax.config.jax_compilation_cache_dir
