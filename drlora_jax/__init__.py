import sys

from drlora_jax import early

__version__ = "0.1.0"

# The first line of ours that a command runs: a signal during the imports that follow is answered.
if early.is_command(sys.argv, sys.orig_argv):
    early.install()
