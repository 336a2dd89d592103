"""Keeps the memory of a CPU step's intermediate results in the process, from one step to the next.

XLA allocates all of a step's intermediate results at once and frees them at its end. glibc returns
so large a block to the system, which clears and maps it again page by page in the next step: a
tenth of the time of a step with 400 MB. To keep it on the heap two things are needed, because only
the first thread of a process has a heap of unlimited size: that thread has to run the step, and
nothing may be returned to the system.
"""

import ctypes
import os
import platform as python_platform

import jax

# mallopt(3)
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def run_on_calling_thread() -> None:
    """Makes CPU computations of one device run on the thread that starts them, unless
    JAX_CPU_ENABLE_ASYNC_DISPATCH says otherwise. Call it before jax looks for devices.
    """
    if "JAX_CPU_ENABLE_ASYNC_DISPATCH" not in os.environ:
        jax.config.update("jax_cpu_enable_async_dispatch", False)


def keep_freed_memory(platform: str) -> bool:
    """Stops malloc from returning memory to the system if computations run on CPU; returns whether
    it did.

    This works with glibc only. On an accelerator the host's large blocks are files being read,
    which are better returned.
    """
    if platform != "cpu" or python_platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    never = -1
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, never))
