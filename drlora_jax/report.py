"""`python -m drlora_jax.report --run DIR [--run DIR ...]`: writes the report of a run, or one that
compares several, as a single HTML file that needs no network.

A run rewrites its own `report.html` at every checkpoint; this command does so at any time, also for
a run that is still going or was killed. Exit codes: 0 written, 1 the file could not be written, 2 a
mistake in the arguments.
"""

import argparse
import pathlib

from drlora_jax import cli
from drlora_jax.errors import EXIT_DONE, RunError, UserError
from drlora_jax.reporting.page import write_report
from drlora_jax.system.paths import local_path


def main(argv=None) -> int:
    parser = cli.Parser(
        prog="python -m drlora_jax.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--run",
        action="append",
        required=True,
        metavar="DIR",
        help="run.dir of a training; may be repeated to compare runs",
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="file to write (default: report.html in the run directory; for several runs "
        "comparison.html in the current one)",
    )
    args = parser.parse_args(argv)
    directories = [local_path(run, "--run") for run in args.run]
    default = directories[0] / "report.html"
    if len(directories) > 1:
        default = pathlib.Path("comparison.html")
    out = local_path(args.out, "--out") if args.out else default
    if args.out and (out.is_dir() or not out.absolute().parent.is_dir()):
        raise UserError(f"--out {args.out}: give a file in a directory that exists.")
    try:
        write_report(directories, out)
    except OSError as error:
        raise RunError(f"{out} cannot be written: {error.strerror}.") from error
    print(f"wrote {out}")
    return EXIT_DONE


if __name__ == "__main__":
    cli.run_and_exit(main)
