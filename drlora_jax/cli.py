"""What the entry points share: arguments, and how mistakes and failures end a process."""

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from drlora_jax import config as config_lib
from drlora_jax.errors import EXIT_FAILED, EXIT_USER_MISTAKE, RunError, UserError


def parse_arguments(prog: str, description: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """`--config FILE.py [--dry-run] [section.field=value ...]`; `--help` lists every field."""
    fields = "\n".join(
        f"  {name} ({kind}) = {value!r}" for name, kind, value in config_lib.all_fields()
    )
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=f"fields, with their types and defaults:\n{fields}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", required=True, help="a Python file with get_config(), or bundled:NAME"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print the plan and stop"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    return parser.parse_intermixed_args(argv)


def run_and_exit(main: Callable[[], int]) -> None:
    """Runs `main` and exits with its code; user mistakes and failed runs end with one message, no
    traceback.
    """
    # XLA and Orbax report on standard error below our own messages unless told otherwise.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # transformers is used for tokenizers; it need not say that torch is absent.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        code = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = EXIT_USER_MISTAKE
    except RunError as error:
        print(f"failed: {error}", file=sys.stderr)
        code = EXIT_FAILED
    except (OSError, RuntimeError, ValueError) as error:
        # Not foreseen: the traceback helps whoever mends it, the last line says what happened.
        traceback.print_exc()
        print(
            f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
            file=sys.stderr,
        )
        code = EXIT_FAILED
    sys.exit(code)
