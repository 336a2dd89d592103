"""Times our training steps and those of transformers + peft in turns, on the same machine.

    python benchmarks/peers_cpu.py [--rounds 3] [--steps 5] [--python .venv313/bin/python]

Weights and batch are the same. Needs torch and peft (the extra `oracle`). If they do not support
the Python that the newest jax requires, `--python` names another environment's interpreter for all
sides except peft's. The case: OLMoE-like, 4 layers, width 512, 64 experts of 256 with 8 active, 8
heads, vocabulary 8,192, float32; LoRA of rank 16 on gate_up, down, q and v; 4 rows of 512 tokens;
AdamW. peft runs with `target_parameters` and grouped_mm, its fastest setting; ours with the
defaults of training, and once more saving memory (model.remat=full, train.micro_batches=4). Every
measurement is a separate process, so that peak memory is the process's own; the losses of the first
step must agree, because B starts at zero.

In every round one more process times the bare products of that step in programs that do nothing
else: gate_up and down of every expert for its rows when tokens are spread evenly, forward and input
gradient, attention's projections and the head likewise; then LoRA's products with their gradients,
and attention's, in blocks. Their time is a lower bound for the step's own products at XLA's rate;
it is printed as a share of each side's step.
"""

import argparse
import json
import math
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from typing import NamedTuple

import numpy as np

ROWS, LENGTH, RANK = 4, 512, 16
ATTENTION_BLOCK = 128  # of drlora_jax.ops.attention.chunked
TOGETHER = 8
CONFIG = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "pad_token_id": 1,
    "eos_token_id": 0,
}


def make_model(directory: pathlib.Path) -> None:
    import torch
    from transformers import OlmoeConfig, OlmoeForCausalLM

    torch.manual_seed(0)
    OlmoeForCausalLM(OlmoeConfig(**CONFIG)).to(torch.float32).save_pretrained(directory)


def tokens(steps: int) -> np.ndarray:
    return np.random.default_rng(0).integers(2, 8192, size=(steps, ROWS, LENGTH))


def measure(step, steps: int, warmup: int = 2) -> dict:
    """Runs `step(index) -> loss`; the first steps compile and are not timed."""
    losses, seconds = [], []
    for index in range(warmup + steps):
        start = time.perf_counter()
        losses.append(step(index))
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    rate = ROWS * LENGTH / float(np.median(seconds[warmup:]))
    return {"tokens_per_second": rate, "peak_gib": peak, "first_loss": losses[0]}


def run_peft(directory: str, steps: int) -> dict:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import OlmoeForCausalLM

    model = OlmoeForCausalLM.from_pretrained(
        directory, dtype=torch.float32, experts_implementation="grouped_mm"
    )
    lora = LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=["q_proj", "v_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    model = get_peft_model(model, lora)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    batches = torch.from_numpy(tokens(steps + 2))

    def step(index):
        loss = model(input_ids=batches[index], labels=batches[index], use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return measure(step, steps)


class Product(NamedTuple):
    """One of a step's products, as it is computed by itself."""

    count: int
    equation: str  # of einsum
    left: tuple[int, ...]
    right: tuple[int, ...]

    @property
    def operations(self) -> int:
        """Of all of them: a multiplication and an addition for every index of the equation."""
        left, right = self.equation.split("->")[0].split(",")
        sizes = dict(zip(left + right, self.left + self.right, strict=True))
        return 2 * self.count * math.prod(sizes.values())


def bare_products() -> dict[str, list[Product]]:
    """Returns the products of a step with a frozen base: those with its weights, with LoRA
    matrices, and of attention.
    """
    layers, experts, heads = (
        CONFIG[name] for name in ("num_hidden_layers", "num_experts", "num_attention_heads")
    )
    width, hidden, vocabulary = (
        CONFIG[name] for name in ("hidden_size", "intermediate_size", "vocab_size")
    )
    tokens = ROWS * LENGTH
    rows = tokens * CONFIG["num_experts_per_tok"] // experts
    sizes = {  # count, rows, in, out
        "gate_up": (layers * experts, rows, width, 2 * hidden),
        "down": (layers * experts, rows, hidden, width),
        "attention": (4 * layers, tokens, width, width),
        "head": (1, tokens, width, vocabulary),
    }
    base, factors = [], []
    for count, rows, width_in, width_out in sizes.values():
        weights = (width_in, width_out)
        base.append(Product(count, "PD,DF->PF", (rows, width_in), weights))
        # A gradient's product takes the weights as they lie, the other way around.
        base.append(Product(count, "PF,DF->PD", (rows, width_out), weights))
    q_and_v = (2 * layers, tokens, width, width)
    for count, rows, width_in, width_out in (sizes["gate_up"], sizes["down"], q_and_v):
        x, dy, z = (rows, width_in), (rows, width_out), (rows, RANK)
        a, b = (RANK, width_in), (RANK, width_out)
        factors += [
            Product(count, "PD,RD->PR", x, a),
            Product(count, "PR,RF->PF", z, b),
            Product(count, "PF,RF->PR", dy, b),
            Product(count, "PR,RD->PD", z, a),
            Product(count, "PR,PD->RD", z, x),
            Product(count, "PR,PF->RF", z, dy),
        ]
    blocks = LENGTH // ATTENTION_BLOCK
    count, head_width = layers * blocks * (blocks + 1) // 2, width // heads  # none behind a query
    rows = (ROWS * heads, ATTENTION_BLOCK, head_width)
    scores = (ROWS * heads, ATTENTION_BLOCK, ATTENTION_BLOCK)
    attention = [
        # Scores, again in the backward pass, and what comes back to the weights.
        Product(3 * count, "GTH,GSH->GTS", rows, rows),
        # What comes out, and the gradient of queries.
        Product(2 * count, "GTS,GSH->GTH", scores, rows),
        # The gradients of keys and values.
        Product(2 * count, "GTS,GTH->GSH", scores, rows),
    ]
    return {"base": base, "factors": factors, "attention": attention}


def run_products(directory: str, steps: int) -> dict:
    """Returns the seconds of all bare products of a step, and operations, by kind."""
    import jax
    import jax.numpy as jnp
    from timing import median_seconds

    from drlora_jax.system.host_memory import keep_freed_memory, run_on_calling_thread

    run_on_calling_thread()
    keep_freed_memory("cpu")  # as in our step: fresh memory is no part of a product

    def seconds(product: Product) -> float:
        # Many small ones share a program, which would take a third of their time to start.
        together = TOGETHER if product.count >= CONFIG["num_experts"] else 1
        keys = jax.random.split(jax.random.key(0), 2 * together)
        lefts = [jax.random.normal(key, product.left) for key in keys[:together]]
        rights = [jax.random.normal(key, product.right) for key in keys[together:]]

        @jax.jit
        def compute(lefts, rights):
            return list(map(partial(jnp.einsum, product.equation), lefts, rights))

        taken = median_seconds(compute, lefts, rights, repeats=steps)
        return product.count / together * taken

    return {
        kind: {
            "seconds": sum(map(seconds, products)),
            "operations": sum(product.operations for product in products),
        }
        for kind, products in bare_products().items()
    }


def run_saving(directory: str, steps: int) -> dict:
    return run_ours(directory, steps, remat="full", micro_batches=ROWS)


def run_ours(directory: str, steps: int, *, remat: str | None = None, micro_batches=1) -> dict:
    import dataclasses

    import jax
    import jax.numpy as jnp

    from drlora_jax.adapters.expert_lora import ExpertLora
    from drlora_jax.adapters.targets import resolve_targets
    from drlora_jax.allocation import CapacityShapes, masks_from_ranks
    from drlora_jax.allocation.uniform import uniform
    from drlora_jax.config import ModelSection, TrainSection
    from drlora_jax.data.loader import Batch, split_micro_batches
    from drlora_jax.interop.hf_files import read_model_config
    from drlora_jax.interop.hf_read import load_model
    from drlora_jax.ops import ops_for
    from drlora_jax.system.host_memory import keep_freed_memory, run_on_calling_thread
    from drlora_jax.training.optimizer import make_optimizer
    from drlora_jax.training.step import StepOptions, TrainState, init_lora, make_train_step

    run_on_calling_thread()
    keep_freed_memory("cpu")
    config = read_model_config(pathlib.Path(directory))
    paths = resolve_targets(config, "expert_lora", ("gate_up", "down", "q", "v"))
    adapter = ExpertLora(paths, scale=2.0, rank=RANK, max_rank=RANK)
    model, params = load_model(directory, adapter=adapter)
    options = dataclasses.replace(
        model.options, remat=remat or ModelSection().remat, ops=ops_for("cpu")
    )
    model = model.clone(options=options)
    policy = uniform(CapacityShapes(4, 2, 64, RANK), rank=RANK)
    tx, _ = make_optimizer(TrainSection(steps=1000, learning_rate=1e-4), 1000)

    def fresh():
        lora = init_lora(model, jax.random.key(0))
        mask_LER = jnp.asarray(masks_from_ranks(policy.init().ranks_LE, RANK))
        return TrainState(jnp.zeros((), jnp.int32), lora, tx.init(lora), mask_LER, ())

    state = jax.jit(fresh)()
    train_step = jax.jit(make_train_step(model, tx, policy, StepOptions()), donate_argnums=1)
    ids = tokens(steps + 2).astype(np.int32)
    targets = np.concatenate([ids[:, :, 1:], ids[:, :, :1]], axis=2)
    mask = np.ones((ROWS, LENGTH), np.float32)
    mask[:, -1] = 0
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH))
    ones = np.ones((ROWS, LENGTH), np.int32)

    def step(index):
        nonlocal state
        arrays = (ids[index], targets[index], ones, positions, mask)
        batch = split_micro_batches(Batch(*arrays), micro_batches)
        state, metrics = train_step(params, state, batch)
        return float(metrics["loss"])

    return measure(step, steps)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--python", default=sys.executable, help="of every side but peft's")
    parser.add_argument("--side", choices=tuple(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print("RESULT " + json.dumps(SIDES[args.side](args.model, args.steps)))
        return
    rounds: dict[str, list[dict]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        make_model(pathlib.Path(folder))
        for number in range(args.rounds):
            for side, rows in rounds.items():
                python = sys.executable if side == "peft" else args.python
                command = [python, __file__, "--side", side, "--model", folder]
                command += ["--steps", str(args.steps)]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                line = next(line for line in output.splitlines() if line.startswith("RESULT "))
                rows.append(json.loads(line.removeprefix("RESULT ")))
                print(f"round {number + 1} {side}: {rows[-1]}", flush=True)
    products = rounds.pop("products")
    losses = {side: rows[0]["first_loss"] for side, rows in rounds.items()}
    for side, loss in losses.items():
        assert abs(loss - losses["peft"]) < 1e-4 * losses["peft"], (side, losses)
    for name in ("tokens_per_second", "peak_gib"):
        print(f"{name}: {', '.join(_summary(name, rounds))}")
    for kinds in (("base",), tuple(products[0])):
        print(products_line(products, rounds, kinds))


def products_line(
    products: list[dict], rounds: dict[str, list[dict]], kinds: tuple[str, ...]
) -> str:
    """Returns the bare products' time, and what share of each side's step of the same round that
    is.
    """
    seconds, operations = (
        np.array([sum(row[kind][name] for kind in kinds) for row in products])
        for name in ("seconds", "operations")
    )
    shares = []
    for side, rows in rounds.items():
        taken = np.array([ROWS * LENGTH / row["tokens_per_second"] for row in rows])
        shares.append(f"{side} {np.median(seconds / taken):.2f}")
    rate = np.median(operations / seconds) / 1e9
    line = f"bare products of {', '.join(kinds)}: {np.median(seconds):.3f} s a step at {rate:.0f} "
    return line + f"GFLOP/s; of the step's time {', '.join(shares)}"


def _summary(name: str, results: dict) -> list[str]:
    """Returns medians, and the median ratio to peft in the same round."""
    parts = []
    for side, rows in results.items():
        pairs = zip(rows, results["peft"], strict=True)
        ratio = np.median([ours[name] / peft[name] for ours, peft in pairs])
        parts.append(f"{side} {np.median([row[name] for row in rows]):.2f} (ratio {ratio:.2f})")
    return parts


SIDES = {"ours": run_ours, "saving": run_saving, "peft": run_peft, "products": run_products}

if __name__ == "__main__":
    main()
