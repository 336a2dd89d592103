"""Compares decoding speed with `transformers`: same weights, prompts and f32, greedy, in turns.

    python tools/smollm2.py --out build/smollm2
    python benchmarks/decode_cpu.py --model build/smollm2 --batch-sizes 1,8 --new-tokens 64

Prints tokens per second of both and their ratio (median over rounds), and whether the generated
tokens are equal. The time includes the first pass over the prompt, but not compilation.
"""

import argparse
import statistics
import time

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from drlora_jax.inference.generation import Generator
from drlora_jax.inference.model import load_base

TEXTS = (
    "The capital of France is",
    "Once upon a time, there was a little girl named Lily. She loved to",
    "def fibonacci(n):\n    ",
    "Question: A farmer has 12 cows and buys 7 more. How many cows does he have?\nAnswer:",
    "The main difference between a virus and a bacterium is that",
    "In 1969, astronauts first",
    "To bake bread you need",
    "The three states of matter are",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--batch-sizes", default="1,8")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    loaded = load_base(args.model)
    peer = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    for batch in map(int, args.batch_sizes.split(",")):
        prompts = [loaded.tokenizer(text).input_ids for text in TEXTS[:batch]]
        generator = Generator(loaded, batch_size=batch)
        runs = {
            "ours": lambda g=generator, p=prompts: ours(g, p, args.new_tokens),
            "transformers": lambda p=prompts: theirs(peer, p, args.new_tokens),
        }
        answers = {name: run() for name, run in runs.items()}  # compiles, and warms up
        same = sum(a == b for a, b in zip(*answers.values(), strict=True))
        seconds = {name: [] for name in runs}
        for _ in range(args.rounds):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
        rates = {
            name: batch * args.new_tokens / statistics.median(times)
            for name, times in seconds.items()
        }
        ratios = np.array(seconds["transformers"]) / np.array(seconds["ours"])
        print(
            f"batch {batch}: ours {rates['ours']:.1f} tok/s, transformers "
            f"{rates['transformers']:.1f} tok/s, {np.median(ratios):.2f}x "
            f"({ratios.min():.2f} to {ratios.max():.2f}); {same} of {batch} answers identical",
            flush=True,
        )


def ours(generator: Generator, prompts, new_tokens: int) -> list[list[int]]:
    """Generates exactly `new_tokens` tokens: for both sides, end-of-text does not end a row."""
    generator._end = -1
    return [answer.tokens for answer in generator.generate(prompts, max_new_tokens=new_tokens)]


@torch.no_grad()
def theirs(model, prompts, new_tokens: int) -> list[list[int]]:
    """Runs `generate` on left-padded prompts, as its documentation recommends."""
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(
        tokens,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[:, longest:].tolist()


if __name__ == "__main__":
    main()
