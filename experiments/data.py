"""Rows of the two tasks, each of one domain; the files it writes are kept in experiments/data.

    python -m experiments.data --mbpp mbpp.jsonl.gz

    maths  GSM8K training rows that the package carries (none of them was in the pretraining of
           bundled:tiny_moe): its 1,000 training rows as they are, its 200 held-out ones split
    code   MBPP (google-research/mbpp, 974 problems, CC-BY-4.0): the problem and its first test as
           the question, the reference solution as the answer; the base was pretrained on the Python
           standard library, not on these

Held-out rows go by the sha256 of their question: `tune` chooses learning rates, `test` compares.
"""

import argparse
import gzip
import hashlib
import json
import pathlib

DATA = pathlib.Path(__file__).parent / "data"
BUNDLED = pathlib.Path(__file__).parents[1] / "drlora_jax" / "bundled" / "gsm8k"
MBPP_SHA256 = (
    "ccf64ceae9c5403bf50a044cb6d505bfd2a2963ee58338ba268fd65beab92a9f"  # of the uncompressed file
)
TUNE, TEST = 60, 140
LONGEST = {"maths": 600, "code": 400}  # characters of a question: a row is 256 tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mbpp", type=pathlib.Path, required=True, help="mbpp.jsonl or .gz")
    rows = read_mbpp(parser.parse_args().mbpp)
    maths = _ordered(_read(BUNDLED / "heldout.jsonl"))
    write("maths_tune", maths[:TUNE])
    write("maths_test", _short(maths[TUNE : TUNE + TEST], LONGEST["maths"]))
    code = _ordered(_short(rows, LONGEST["code"]))
    write("code_tune", code[:TUNE])
    write("code_test", code[TUNE : TUNE + TEST])
    heldout = {row[field] for row in code[: TUNE + TEST] for field in row}
    # Some problems are in MBPP twice.
    write("code_train", [row for row in code[TUNE + TEST :] if not heldout & set(row.values())])


def read_mbpp(file: pathlib.Path) -> list[dict]:
    data = file.read_bytes()
    data = gzip.decompress(data) if file.suffix == ".gz" else data
    digest = hashlib.sha256(data).hexdigest()
    if digest != MBPP_SHA256:
        raise SystemExit(f"{file} has sha256 {digest}, expected {MBPP_SHA256}.")
    return [
        {
            "prompt": f"{row['text']}\n{row['test_list'][0]}",
            "response": row["code"].replace("\r\n", "\n"),
        }
        for row in map(json.loads, data.decode().splitlines())
    ]


def _read(file: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _short(rows: list[dict], longest: int) -> list[dict]:
    return [row for row in rows if len(row["prompt"]) <= longest]


def _ordered(rows: list[dict]) -> list[dict]:
    return sorted(rows, key=lambda row: hashlib.sha256(row["prompt"].encode()).hexdigest())


def write(name: str, rows: list[dict]) -> None:
    DATA.mkdir(exist_ok=True)
    lines = (json.dumps(row, ensure_ascii=False) for row in rows)
    (DATA / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{name}: {len(rows)} rows")


if __name__ == "__main__":
    main()
