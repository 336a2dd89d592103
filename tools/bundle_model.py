"""Puts a pretrained model into the package: weights, and a model card with its measurements.

    python tools/bundle_model.py --run runs/pretrain_tiny [--corpus build/corpus]

The card states held-out loss by domain next to the unigram entropy, and how the experts' load
differs by domain (share of choices, and the mutual information of domain and expert in nats). The
measured values are also stored as data, in pretrain.json.
"""

import argparse
import json
import pathlib
import shutil

import numpy as np
from transformers import AutoTokenizer

from drlora_jax.evaluation.statistics import mutual_information

BUNDLE = pathlib.Path(__file__).parents[1] / "drlora_jax" / "bundled" / "tiny_moe"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=pathlib.Path, required=True)
    parser.add_argument("--corpus", type=pathlib.Path, default=pathlib.Path("build/corpus"))
    parser.add_argument("--note", default="", help="what was special about the run, for the card")
    args = parser.parse_args()
    report = json.loads((args.run / "pretrain.json").read_text())
    manifest = json.loads((args.corpus / "manifest.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(BUNDLE)
    unigram = {name: unigram_loss(args.corpus, name, tokenizer) for name in report["heldout"]}
    shutil.copy(args.run / "model" / "model.safetensors", BUNDLE)
    shutil.copy(args.run / "model" / "config.json", BUNDLE)
    shutil.copy(args.run / "pretrain.json", BUNDLE)
    (BUNDLE / "README.md").write_text(
        model_card(report, manifest, unigram, args.note), encoding="utf-8"
    )
    print((BUNDLE / "README.md").read_text())


def read_tokens(file: pathlib.Path, tokenizer, limit: int = 4_000_000) -> np.ndarray:
    """Counts the tokens of a corpus file's first `limit` characters."""
    counts, size = np.zeros(len(tokenizer)), 0
    for line in file.open(encoding="utf-8"):
        text = json.loads(line)["text"]
        counts += np.bincount(tokenizer(text).input_ids, minlength=len(tokenizer))
        size += len(text)
        if size > limit:
            break
    return counts


def unigram_loss(corpus: pathlib.Path, name: str, tokenizer) -> float:
    """Returns nats per held-out token under the domain's own token frequencies, with add-one
    smoothing.
    """
    train = read_tokens(corpus / "train" / f"{name}.jsonl", tokenizer) + 1
    heldout = read_tokens(corpus / "heldout" / f"{name}.jsonl", tokenizer)
    return float(-(heldout * np.log(train / train.sum())).sum() / heldout.sum())


def model_card(report: dict, manifest: dict, unigram: dict[str, float], note: str) -> str:
    heldout = report["heldout"]
    lines = [
        "# tiny_moe",
        "",
        "A Mixture-of-Experts language model small enough to travel inside a Python package: OLMoE "
        "architecture, 4 layers,",
        "width 192, 8 experts of 256 with 2 active, vocabulary 4,096, 6.9 M parameters (2.6 M "
        "active, embedding not counted), bfloat16. It is",
        "for tests, first steps and experiments with expert-wise methods; it writes grammatical, "
        "empty text.",
        "",
        "Trained from scratch with `python -m drlora_jax.pretrain --config "
        "configs/pretrain_tiny.py`: "
        f"{report['steps']:,} steps of 16 rows of",
        "256 tokens, equal parts of four domains." + (f" {note}" if note else ""),
        "",
        "| domain | held-out loss, nats per token | unigram entropy | held-out tokens |",
        "|---|--:|--:|--:|",
    ]
    for name, values in heldout.items():
        row = f"| {name} | {values['loss']:.3f} | {unigram[name]:.3f} | {values['tokens']:,} |"
        lines.append(row)
    lines += [
        "",
        "## Routing",
        "",
        "Share of choices by expert on held-out text (uniform: 0.125).",
        "",
    ]
    loads = {name: np.array(values["load"]) for name, values in heldout.items()}
    layers, experts = next(iter(loads.values())).shape
    for layer in range(layers):
        information = mutual_information(np.stack([load[layer] for load in loads.values()]))
        lines += [
            f"Layer {layer}, mutual information of domain and expert {information:.2f} nats (at "
            f"most 1.39):",
            "",
            "| domain | " + " | ".join(map(str, range(experts))) + " |",
            "|---|" + "--:|" * experts,
        ]
        for name, load in loads.items():
            lines.append(
                f"| {name} | " + " | ".join(f"{share:.2f}" for share in load[layer]) + " |"
            )
        lines.append("")
    lines += [
        "## Data",
        "",
        "Built by `tools/build_corpus.py`, which names the public origin (repository, commit, "
        "path) and sha256 of every input.",
        "Stories: TinyStories (CDLA-Sharing-1.0). Books: public-domain texts. Code: the Python "
        "standard library "
        f"({manifest['python']}, PSF",
        "licence). Mathematics: GSM8K training rows (MIT; not those in `../gsm8k`) and procedural "
        "problems of reasoning-gym "
        f"{manifest['reasoning_gym']}",
        "(Apache-2.0); one of its tasks, gsm_symbolic, is modelled on GSM8K questions, so do not "
        "quote GSM8K *test* scores of",
        "this model as uncontaminated.",
        "",
        "| file | rows | bytes | sha256 |",
        "|---|--:|--:|---|",
    ]
    for name, values in sorted(manifest["files"].items()):
        lines.append(
            f"| {name} | {values['rows']:,} | {values['bytes']:,} | `{values['sha256'][:16]}` |"
        )
    lines += ["", "The weights are released under Apache-2.0.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
