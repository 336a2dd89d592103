import _signal
import os
import sys

__version__ = "0.1.0"


def _end(number, _):
    os.write(2, b"stopped by a signal: the same command starts again\n")
    os._exit(75)


# `python -m drlora_jax.NAME`, before anything of it is imported. Nothing of ours runs earlier, and
# what is imported here is in memory already: `early` takes over as soon as it is imported itself.
if sys.argv[:1] == ["-m"] and any("drlora_jax." in each for each in sys.orig_argv[1:]):
    for _number in (_signal.SIGINT, _signal.SIGTERM):
        _signal.signal(_number, _end)
    from drlora_jax.system import early

    early.install()
