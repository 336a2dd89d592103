"""Adaptive-capacity LoRA for Mixture-of-Experts language models, in JAX.

    import drlora_jax as dj

    model, params = dj.load_model("bundled:tiny_moe")
    job = dj.prepare(dj.load_config("bundled:tiny", ["run.dir=runs/tiny"]))
    dj.train(job)
    print(dj.load_run("runs/tiny").generate("What is 2 plus 3?"))

The names in `__all__` are the public API, described in `drlora_jax.api`; the rest may change
without notice. They are imported at their first use: `import drlora_jax` alone imports no jax.
"""

import _signal
import importlib
import os
import sys

TYPE_CHECKING = False  # importing `typing` takes milliseconds in which no signal is handled
if TYPE_CHECKING:
    from drlora_jax.api import (
        CapacityShapes,
        CapacityState,
        Event,
        Job,
        Placement,
        Policy,
        TrainedModel,
        attach,
        load_config,
        load_model,
        load_run,
        logits,
        prepare,
    )
    from drlora_jax.train import train_job as train

__version__ = "0.1.0"

__all__ = [
    "CapacityShapes",
    "CapacityState",
    "Event",
    "Job",
    "Placement",
    "Policy",
    "TrainedModel",
    "attach",
    "load_config",
    "load_model",
    "load_run",
    "logits",
    "prepare",
    "train",
]


def __getattr__(name: str):
    if name == "train":  # the command's module, which is callable
        return importlib.import_module("drlora_jax.train")
    if name in __all__:
        return getattr(importlib.import_module("drlora_jax.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _end(number, _):
    os.write(2, b"stopped by a signal: run the same command again\n")
    os._exit(75)


# For `python -m drlora_jax.NAME`, before any of its modules is imported: this is our earliest code,
# and the modules imported above are in memory already. `early` takes over once it is imported.
if sys.argv[:1] == ["-m"] and any("drlora_jax." in each for each in sys.orig_argv[1:]):
    for _number in (_signal.SIGINT, _signal.SIGTERM):
        _signal.signal(_number, _end)
    from drlora_jax.system import early

    early.install()
