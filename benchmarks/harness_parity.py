"""Compares our model with lm-evaluation-harness's own `hf` model, sample by sample.

    pip install -e ".[eval,oracle]" && python tools/smollm2.py --out build/smollm2
    python benchmarks/harness_parity.py --model build/smollm2 --choices ARC-Easy/test.jsonl

Three tasks on the same weights, defined here over local files: multiple choice (log-likelihoods),
texts (rolling) and written answers; then greedy tokens against `transformers`' own `generate`, one
prompt at a time. Everything is in f32. `--float64` adds two models: `hf64` is `hf` with its option
`softmax_dtype=float64` (the same f32 forward pass, but log-softmax and the sum over tokens in f64),
and `f64` is torch in f64 throughout, the reference for all. With a vocabulary of 49,152, torch's
f32 log-softmax on a CPU is off by 8e-6 per token on average, which adds up over an answer.
"""

import argparse
import json
import pathlib
import tempfile
import time

import numpy as np
import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM

from drlora_jax.data.sources import read_rows
from drlora_jax.data.task_questions import read_question
from drlora_jax.evaluation import harness
from drlora_jax.evaluation.harness_model import JaxLM
from drlora_jax.evaluation.records import Settings
from drlora_jax.inference.generation import Generator
from drlora_jax.inference.model import load_base

HEAD = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/{name}.jsonl}}}}
test_split: test
"""
DEFINITIONS = {
    "choices": """
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "texts": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
""",
    "answers": """
output_type: generate_until
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["Question:"], max_gen_toks: NEW_TOKENS, do_sample: false}
filter_list:
  - name: number
    filter:
      - {function: regex, regex_pattern: "(-?[0-9]+)", group_select: -1}
      - {function: take_first}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--choices", required=True, help="rows of ARC-Easy")
    parser.add_argument("--items", type=int, default=100, help="of multiple choice")
    parser.add_argument("--texts", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=256, help="several windows a text")
    parser.add_argument("--float64", action="store_true")
    args = parser.parse_args()
    loaded = load_base(args.model, dtype="float32")
    peer = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    with tempfile.TemporaryDirectory() as folder:
        write_tasks(pathlib.Path(folder), args)
        size = dict(batch_size=args.batch_size, max_length=args.max_length)
        models = {"ours": JaxLM(loaded, **size), "hf": hf_model(peer, loaded.tokenizer, **size)}
        for name in ("choices", "texts"):
            found = {each: answer(model, name, folder, loaded) for each, model in models.items()}
            if args.float64:
                finer = hf_model(peer, loaded.tokenizer, softmax_dtype="float64", **size)
                found["hf64"] = answer(finer, name, folder, loaded)
                exact = hf_model(peer.double(), loaded.tokenizer, **size)
                found["f64"] = answer(exact, name, folder, loaded)
                peer.float()
            compare(name, found)
        if args.prompts:
            found = {
                each: answer(model, "answers", folder, loaded) for each, model in models.items()
            }
            compare("answers", found)
            compare_tokens(loaded, peer, prompts_of(args), args)


def write_tasks(folder: pathlib.Path, args) -> None:
    questions = [
        read_question(row, "arc_easy")
        for row, _ in zip(read_rows(args.choices), range(args.items), strict=False)
    ]
    rows = {
        "choices": [
            {"question": each.text, "choices": list(each.choices), "gold": each.gold}
            for each in questions
        ],
        "answers": prompts_of(args),
        "texts": texts_of(args.texts),
    }
    for name, definition in DEFINITIONS.items():
        text = HEAD.format(name=name, folder=folder) + definition
        (folder / f"{name}.yaml").write_text(text.replace("NEW_TOKENS", str(args.new_tokens)))
        lines = "".join(json.dumps(row) + "\n" for row in rows[name])
        (folder / f"{name}.jsonl").write_text(lines)


def prompts_of(args) -> list[dict]:
    return gsm8k(args.prompts)


def gsm8k(count: int) -> list[dict]:
    """Returns rows of the package: {question, answer}."""
    rows = [row.fields for row in read_rows("bundled:gsm8k/heldout.jsonl")][:count]
    return [{"question": row["prompt"], "answer": row["response"]} for row in rows]


def texts_of(count: int) -> list[dict]:
    """Returns texts of 1 to 5 rows each, some longer than a window."""
    rows = [f"{row['question']}\n{row['answer']}" for row in gsm8k(3 * count)]
    sizes = [1 + index % 5 for index in range(count)]
    ends = np.cumsum(sizes)
    return [
        {"text": "\n\n".join(rows[end - size : end])}
        for end, size in zip(ends, sizes, strict=True)
        if end <= len(rows)
    ]


def hf_model(peer, tokenizer, **options) -> HFLM:
    return HFLM(pretrained=peer, tokenizer=tokenizer, **options)


def answer(model, name: str, folder: str, loaded) -> dict:
    prepared = harness.prepare([name], Settings(), task_path=folder)
    start = time.perf_counter()
    output = evaluate(lm=model, task_dict=prepared.found, bootstrap_iters=0)
    row = output["results"][name].items()
    return {
        "seconds": time.perf_counter() - start,
        "scores": {key: value for key, value in row if isinstance(value, float)},
        "responses": [part[0] for each in output["samples"][name] for part in each["resps"]],
    }


def compare(name: str, found: dict[str, dict]) -> None:
    responses = {model: each["responses"] for model, each in found.items()}
    times = ", ".join(f"{model} {each['seconds']:.0f} s" for model, each in found.items())
    print(f"\n{name}: {len(responses['ours'])} requests ({times})")
    for model, each in found.items():
        print(f"  {model:4} {each['scores']}")
    if name == "answers":
        same = sum(a == b for a, b in zip(responses["ours"], responses["hf"], strict=True))
        print(f"  equal texts: {same} of {len(responses['ours'])}", flush=True)
        return
    totals = {
        model: np.array([total_of(each) for each in rows]) for model, rows in responses.items()
    }
    pairs = [("ours", "hf"), ("ours", "hf64")] + [(each, "f64") for each in ("ours", "hf", "hf64")]
    for first, second in pairs:
        if second in totals:
            print(f"  |{first} - {second}| {spread(np.abs(totals[first] - totals[second]))}")
    print(f"  log-likelihoods from {totals['hf'].min():.1f} to {totals['hf'].max():.1f}")
    if name == "choices":
        flags = [[each[1] for each in responses[model]] for model in ("ours", "hf")]
        same = sum(a == b for a, b in zip(*flags, strict=True))
        print(f"  equal is_greedy: {same} of {len(flags[0])}, of which true: {sum(flags[1])}")


def total_of(response) -> float:
    return response[0] if isinstance(response, tuple | list) else response


def spread(values: np.ndarray) -> str:
    above = int((values > 1e-4).sum())
    return (
        f"max {values.max():.2e}, median {np.median(values):.2e}, {above} of {values.size} above "
        "1e-4"
    )


@torch.no_grad()
def compare_tokens(loaded, peer, rows: list[dict], args) -> None:
    """Compares greedy tokens, and the gap between the two likeliest tokens where they diverge."""
    ids = [loaded.tokenizer(f"Question: {row['question']}\nAnswer:").input_ids for row in rows]
    generator = Generator(loaded, batch_size=args.batch_size)
    ours = generator.generate(ids, max_new_tokens=args.new_tokens)
    same = 0
    for prompt, answer_ in zip(ids, ours, strict=True):
        tokens = torch.tensor([prompt])
        written = peer.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=args.new_tokens,
            pad_token_id=loaded.tokenizer.pad_token_id,
        )[0, len(prompt) :].tolist()
        same += written == answer_.tokens
        if written != answer_.tokens:
            at = next(
                i
                for i, pair in enumerate(zip(written, answer_.tokens, strict=False))
                if len(set(pair)) == 2
            )
            scores = peer(torch.tensor([prompt + written[:at]])).logits[0, -1].topk(2).values
            print(f"  parts at token {at}: logits {scores.tolist()} are the largest two")
    total = sum(len(each.tokens) for each in ours)
    print(
        f"\ngreedy: {same} of {len(ids)} token-identical to transformers.generate ({total} tokens)"
    )


if __name__ == "__main__":
    main()
