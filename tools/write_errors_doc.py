"""Writes docs/errors.md: what every mistake of tests/error_cases ends with.

python tools/write_errors_doc.py [--out FILE]
"""

import argparse
import os
import pathlib
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
# As in the tests: eight simulated devices on a CPU.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

from tests.error_cases import CASES  # noqa: E402  (the path is set above)
from tests.error_cases.case import make_world, run_case  # noqa: E402
from tests.error_cases.document import page, row  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "docs" / "errors.md")
    out = parser.parse_args().out
    rows: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        world = make_world(folder / "world")
        for number, case in enumerate(CASES):
            place = folder / f"case_{number}"
            outcome = run_case(case, world, place)
            rows.setdefault(case.kind, []).append(row(case, outcome, place))
    out.write_text(page(rows), encoding="utf-8")
    print(f"wrote {out}: {len(CASES)} mistakes")


if __name__ == "__main__":
    main()
