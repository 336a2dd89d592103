"""Compares three ways to compute the spectrum of a weight matrix with singular values in float64:
exponents and seconds.

    python tools/smollm2.py --out build/smollm2
    OMP_NUM_THREADS=1 python benchmarks/alpha_cpu.py --model build/smollm2 \
        --sizes 4096x4096,4096x11008

For the model's matrices: the largest difference of an exponent of a matrix and of a layer mean, and
how many experts are allocated differently (5 per layer, beta 2.5). For random matrices of the given
sizes: the time, and the time of a model that has --count of each. Seconds are processor time, so
that a busy machine changes them little. `drlora_jax.alpha` computes as many matrices at once as
there are cores, each in one thread.
"""

import argparse
import resource
import time
from collections.abc import Callable

import numpy as np

from drlora_jax.allocation.alphalora import allocate_experts
from drlora_jax.allocation.spectra import ESTIMATORS, eigenvalues, fit_tail
from drlora_jax.interop.hf_files import find_model, read_model_config
from drlora_jax.interop.spectra_read import find_matrices, read_matrix


def singular(dtype) -> Callable:
    def squares(weight_MN):
        values_N = np.linalg.svd(weight_MN.astype(dtype), compute_uv=False)
        return values_N[::-1].astype(np.float64) ** 2

    return squares


def gram_f32(weight_MN: np.ndarray) -> np.ndarray:
    weight_MN = weight_MN.astype(np.float32)
    smaller = weight_MN if weight_MN.shape[0] <= weight_MN.shape[1] else weight_MN.T
    return np.maximum(np.linalg.eigvalsh(smaller @ smaller.T), 0)


REFERENCE = "SVD float64"
WAYS = {
    REFERENCE: singular(np.float64),
    "SVD float32": singular(np.float32),
    "Gram float64": eigenvalues,  # the one that is used
    "Gram float32": gram_f32,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a directory or bundled:NAME")
    parser.add_argument("--sizes", default="", help="of random matrices, as 4096x4096,4096x11008")
    parser.add_argument("--count", default="128,96", help="of each size (default: LLaMA-2-7B)")
    parser.add_argument("--svd", action="store_true", help="also of the random ones: minutes")
    args = parser.parse_args()
    if args.model:
        compare(args.model)
    sizes = [tuple(map(int, size.split("x"))) for size in args.sizes.split(",") if size]
    if sizes:
        extrapolate(sizes, [int(count) for count in args.count.split(",")], has_svd=args.svd)


def compare(model: str) -> None:
    directory = find_model(model)
    by_layer = find_matrices(read_model_config(directory), directory)
    seconds = dict.fromkeys(WAYS, 0.0)
    alphas = {name: {way: [] for way in WAYS} for name in ESTIMATORS}
    for matrices in by_layer:
        weights = [read_matrix(matrix) for matrix in matrices]
        for way, spectrum in WAYS.items():
            start = time.process_time()
            spectra = [spectrum(weight_MN) for weight_MN in weights]
            seconds[way] += time.process_time() - start
            for name in ESTIMATORS:
                alphas[name][way].append([fit_tail(each, name).alpha for each in spectra])
    print(f"{model}: {sum(map(len, by_layer))} matrices", flush=True)
    for way in WAYS:
        print(f"  {way:<13} {seconds[way]:7.1f} s", flush=True)
        for name in ESTIMATORS if way != REFERENCE else ():
            print(f"    {name:<11} {difference(alphas[name][REFERENCE], alphas[name][way])}")


def difference(expected: list[list[float]], got: list[list[float]]) -> str:
    expected_LM, got_LM = np.array(expected), np.array(got)
    matrix = np.abs(expected_LM - got_LM).max()
    moved = (np.abs(expected_LM - got_LM) > 1e-3).sum()
    layers = [each.mean(axis=1) for each in (expected_LM, got_LM)]
    experts = [allocate_experts(alpha_L, 5 * len(alpha_L)) for alpha_L in layers]
    return (
        f"matrix {matrix:.1e} at most ({moved} above 1e-3), layer mean "
        f"{np.abs(layers[0] - layers[1]).max():.1e}, {(experts[0] != experts[1]).sum()} layers "
        "with other experts"
    )


def extrapolate(sizes: list[tuple[int, int]], counts: list[int], *, has_svd: bool) -> None:
    total = 0.0
    for shape, count in zip(sizes, counts, strict=True):
        weight_MN = np.random.default_rng(0).standard_normal(shape, np.float32)
        for way in ("Gram float64", *(("SVD float32",) if has_svd else ())):
            cpu, wall = time.process_time(), time.perf_counter()
            fit = fit_tail(WAYS[way](weight_MN))
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            print(f"{shape}: {way} {cpu:.1f} s, wall {wall:.1f} s, {fit}", flush=True)
            total += count * cpu if way == "Gram float64" else 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{counts} of them: {total / 60:.0f} min of processor; peak {peak:.1f} GiB")


if __name__ == "__main__":
    main()
