"""Shared by the entry points: parses arguments, and ends a process after mistakes and failures."""

import argparse
import contextlib
import io
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence

import jax

from drlora_jax import config as config_lib
from drlora_jax.errors import EXIT_FAILED, EXIT_RESUMABLE, EXIT_USER_MISTAKE, RunError, UserError
from drlora_jax.parallel import processes
from drlora_jax.parallel.mesh import count_devices
from drlora_jax.system import early
from drlora_jax.system.compilation import keep_compiled_programs
from drlora_jax.system.text import first_line

MAX_MESSAGE = 2000  # characters
OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"  # as XLA names it
FAILURE_OFFSET = "DRLORA_FAILURE_OFFSET"
ADVICE = "use a smaller --batch-size or --max-length if the command has them, or more devices"
# The first half can be followed when resuming, the second cannot.
TRAINING_ADVICE = (
    "with more train.micro_batches, model.remat=full or more devices the same run.dir resumes; a "
    "smaller train.batch_size, train.sequence_length or allocation.r_max needs a new run.dir"
)


class Parser(argparse.ArgumentParser):
    """Parses arguments; those that cannot be parsed raise UserError like any other mistake."""

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else list(args)
        _check_arguments(args)
        return super().parse_known_args(args, namespace)

    def error(self, message):
        hint = ""
        if "unrecognized" in message and "=" in message:
            hint = " Fields are written without dashes: section.field=value."
        raise UserError(f"{message[:1].upper()}{message[1:]}.{hint} See {self.prog} --help.")


def check_text(option: str, value: str) -> None:
    """Refuses text that is not UTF-8; Python keeps such bytes of an argument as lone surrogates."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{option} is not UTF-8 at character {error.start + 1} ({value[error.start]!r}). If "
            "your text is UTF-8, set LC_ALL=C.UTF-8 or PYTHONUTF8=1."
        ) from None


def _check_arguments(args: Sequence[str]) -> None:
    for index, text in enumerate(args):
        check_text(_option_of(args, index), text)


def _option_of(args: Sequence[str], index: int) -> str:
    """Names the option that the argument at an index belongs to, for a message."""
    name, is_assigned, _ = args[index].partition("=")
    if is_assigned and name.isascii():  # --prompt=TEXT, section.field=value
        return "The prompt" if name == "--prompt" else name
    before = args[index - 1] if index else ""
    if before.startswith("--") and "=" not in before:
        return "The prompt" if before == "--prompt" else before
    return f"Argument {index + 1}"


def parse_arguments(prog: str, description: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses `--config FILE.py [--dry-run] [section.field=value ...]`; --help lists all fields."""
    fields = "\n".join(map(_described, config_lib.field_rows()))
    parser = Parser(
        prog=prog,
        description=description,
        epilog=f"fields, with their types, defaults and meanings:\n{fields}",
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


def _described(row: config_lib.FieldRow) -> str:
    lines = [f"  {row.name} ({row.type}) = {row.default!r}"]
    for meaning, kinds in row.meanings:
        lines.append(f"      {meaning}" + (f" [{', '.join(kinds)}]" if kinds else ""))
    return "\n".join(lines)


def model_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """Returns a parser with the arguments that name a model, for `load_model`."""
    parser = Parser(
        prog=prog,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", metavar="DIR", help="run.dir of a training run")
    source.add_argument(
        "--model",
        metavar="PATH",
        help="a base model alone: a directory, a hub name or bundled:NAME",
    )
    parser.add_argument(
        "--step", default="latest", help="checkpoint of the run: latest (default), best, or a step"
    )
    parser.add_argument(
        "--base", action="store_true", help="use the run's base model, without its adapter"
    )
    parser.add_argument(
        "--model-path", metavar="PATH", help="where the run's base model is now, if it has moved"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of weights; default: the run's"
    )
    return parser


def load_model(args: argparse.Namespace, mesh: config_lib.MeshSection | None = None, words=None):
    """Loads the model that the arguments of `model_parser` name.

    Args:
      words: From `open_words`, if they have been opened already.
    """
    from drlora_jax.inference.model import load_base, load_run
    from drlora_jax.inference.words import open_words

    count_devices()  # reports a mistake in the environment in one line
    keep_compiled_programs(jax.default_backend())  # before anything is compiled
    words = words or open_words(args)
    if args.model is not None:
        loaded = load_base(args.model, dtype=args.dtype, mesh=mesh, words=words)
    else:
        loaded = load_run(args.run, base_only=args.base, dtype=args.dtype, mesh=mesh, words=words)
    if processes.is_main():
        print(loaded.computed, file=sys.stderr)
    return loaded


def check_positive(args: argparse.Namespace, *names: str) -> None:
    """Refuses integer arguments below 1."""
    for name in names:
        if getattr(args, name) < 1:
            option = name.replace("_", "-")
            raise UserError(f"--{option} must be 1 or more, got {getattr(args, name)}.")


def run_and_exit(
    main: Callable[[], int], *, memory_advice: str = ADVICE, outlives_output: bool = False
) -> None:
    """Runs `main` and exits with its code; user mistakes and failed runs end with one message, no
    traceback.

    Args:
      memory_advice: What to do when memory does not suffice.
      outlives_output: Whether the work continues when standard output is closed by its reader, or
        the disk of the file that it is redirected to is full.
    """
    if outlives_output and early.handler():
        sys.stdout = Outliving.around(sys.stdout)
    _print_anything()
    _quieten_libraries()
    try:
        _check_arguments(sys.argv[1:])  # for every command, whatever parses them
        code = main()
    except UserError as error:
        code = _end("error", str(error), EXIT_USER_MISTAKE)
    except RunError as error:
        code = _end("failed", str(error), EXIT_FAILED)
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # discards what is still in the buffer
        code = _end("stopped", "standard output was closed by its reader", EXIT_FAILED)
    except KeyboardInterrupt:  # where `early` is not installed
        code = _end("stopped", f"interrupted; {early.ADVICE}", EXIT_RESUMABLE)
    except Exception as error:
        code = _end("failed", _failure(error, memory_advice), EXIT_FAILED)
    if code in (EXIT_FAILED, EXIT_USER_MISTAKE):
        code += failure_offset()
        if jax.distributed.is_initialized():
            processes.leave(code)
    sys.exit(code)


def _quieten_libraries() -> None:
    # By default XLA and Orbax write to standard error after our own messages.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # transformers is used only for tokenizers; its warning that torch is missing is irrelevant.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # What Orbax logs when it fails is also raised as an error with the same reason.
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if early.handler():  # this process is a command
        sys.unraisablehook = without_closed_loops(sys.unraisablehook)


def _failure(error: Exception, memory_advice: str) -> str:
    """Describes an error that is neither UserError nor RunError; prints its traceback unless it is
    an out-of-memory error.
    """
    if isinstance(error, MemoryError) or OUT_OF_MEMORY in str(error):
        return f"out of memory; {memory_advice} ({_named(error)})"
    traceback.print_exc()  # for bug reports; our own last line says what happened
    return _named(error)


class Outliving(io.RawIOBase):
    """Wraps standard output so that a run survives its loss: the first failure is reported on
    standard error, and later output is discarded.
    """

    def __init__(self, number: int):
        self._number, self._is_broken = number, False

    @classmethod
    def around(cls, stream: io.TextIOWrapper) -> io.TextIOWrapper:
        stream.flush()
        raw = io.BufferedWriter(cls(stream.fileno()))
        return io.TextIOWrapper(raw, stream.encoding, line_buffering=stream.line_buffering)

    def write(self, data) -> int:
        if not self._is_broken:
            try:
                return os.write(self._number, data)
            except OSError as error:
                self._is_broken = True
                line = f"warning: standard output is lost ({error.strerror}); the run continues\n"
                with contextlib.suppress(OSError):
                    os.write(2, line.encode())
        return len(data)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._number

    def isatty(self) -> bool:
        return os.isatty(self._number)


def _print_anything() -> None:
    """Escapes characters that a terminal or file cannot encode, instead of failing on them."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def without_closed_loops(hook: Callable) -> Callable:
    """Returns the hook without the errors that TensorStore raises after Orbax has abandoned a
    read.
    """

    def filtered(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    return filtered


def failure_offset() -> int:
    """Returns what a launcher adds, by an environment variable, to the exit codes of failures. A
    launcher that only sees the highest code of all processes would otherwise mistake a failure
    (1, 2) for a lost peer (75).
    """
    text = os.environ.get(FAILURE_OFFSET, "0")
    return int(text) if text.isdigit() and len(text) < 4 else 0


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error) if str(error).strip() else ''}"


def _end(how: str, message: str, code: int) -> int:
    many = jax.distributed.is_initialized() and jax.process_count() > 1
    who = f"process {jax.process_index()}: " if many else ""
    print(f"{how}: {who}{printable(message)}", file=sys.stderr)
    return code


def printable(message: str) -> str:
    """Returns a message as one line that is safe on a terminal: messages quote file names, tensor
    names and rows of unknown origin, which may contain line breaks or control sequences.
    """
    text = " ".join(message.split())
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]}..."
