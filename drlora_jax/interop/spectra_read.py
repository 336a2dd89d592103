"""Computes the spectra of a model's weight matrices, one matrix at a time, and caches them.

The matrices are those of attention and of the FFN, each expert separately: q, k, v, o, gate, up and
down. A tensor that holds several (fused experts, gate above up) is split. Routers, norms, biases,
embedding and head are left out.

The cache has a folder per model fingerprint with a file per layer, written when the layer is done,
so that an interrupted analysis resumes. Damaged and foreign files count as absent.
"""

import contextlib
import hashlib
import os
import pathlib
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from drlora_jax.allocation.spectra import Estimator, TailFit, eigenvalues, fit_tail
from drlora_jax.errors import RunError, UserError
from drlora_jax.interop.hf_files import (
    TensorInfo,
    fingerprint,
    legacy_fingerprint,
    open_weights,
    read_headers,
)
from drlora_jax.interop.hf_read import match_keys
from drlora_jax.models.architecture import (
    ATTENTION_ROLES,
    FFN_ROLES,
    ROUTER,
    Matrix,
    ModelConfig,
)
from drlora_jax.models.families import Slot
from drlora_jax.models.options import DecoderOptions
from drlora_jax.models.transformer import Decoder, abstract_params
from drlora_jax.system.paths import cache_folder, local_path

METHOD = "eigenvalues of the smaller Gram matrix, float64, version 1"
ROLES = (*ATTENTION_ROLES, *FFN_ROLES)
SLOW = 2.0  # seconds; a layer that took longer is reported


class WeightMatrix(NamedTuple):
    """A matrix, and where it is on disk."""

    layer: int  # of the model, from 0
    role: str  # one of ROLES
    expert: int | None
    key: str  # of the tensor
    file: pathlib.Path
    index: tuple[int | slice, ...]  # of the matrix in its tensor
    shape: tuple[int, int]  # as on disk: (out, in)

    @property
    def name(self) -> str:
        """Unique in the model: layer.role, or layer.role.expert."""
        expert = "" if self.expert is None else f".{self.expert}"
        return f"{self.layer}.{self.role}{expert}"


class MatrixFit(NamedTuple):
    matrix: WeightMatrix
    fit: TailFit


class LayerFit(NamedTuple):
    """The exponents of a layer."""

    layer: int
    matrices: list[MatrixFit]
    is_cached: bool  # whether the spectra came from the cache

    @property
    def alpha(self) -> float:
        """The plain mean over the layer's matrices; every expert's matrix counts as one."""
        return float(np.mean([each.fit.alpha for each in self.matrices]))


def fit_layers(
    config: ModelConfig,
    directory: pathlib.Path,
    *,
    estimator: Estimator = "fix_finger",
    cache: pathlib.Path | None = None,
    threads: int = 1,
) -> Iterator[LayerFit]:
    """Yields every layer in order, each as soon as it is done. The host holds one matrix per thread
    at a time.

    Args:
      cache: a folder for the spectra of any number of models, created if needed; None: no cache.
      threads: matrices computed at once. More than one helps if BLAS itself uses one thread.

    Raises:
      UserError: if the weights do not match config.json, or a matrix has no exponent.
      RunError: if the cache cannot be written.
    """
    by_layer = find_matrices(config, directory)
    identity = _identity(directory, cache)
    for layer, matrices in enumerate(by_layer):
        file = cache / identity[:32] / f"layer_{layer:04}.safetensors" if cache else None
        spectra = _load(file, matrices, identity) if file else None
        is_cached = spectra is not None
        if spectra is None:
            with ThreadPoolExecutor(threads) as pool:
                found = list(pool.map(_spectrum, matrices))
            spectra = {each.name: values_N for each, values_N in zip(matrices, found, strict=True)}
            if file:
                _store(file, spectra, identity)
        fits = [MatrixFit(each, _fit(each, spectra[each.name], estimator)) for each in matrices]
        yield LayerFit(layer, fits, is_cached)


def with_progress(layers: Iterator[LayerFit], total: int) -> Iterator[LayerFit]:
    """Yields the layers, and prints a line to standard error for each that took a while."""
    start = time.monotonic()
    for fit in layers:
        seconds = time.monotonic() - start
        if seconds > SLOW and not fit.is_cached:
            done = f"layer {fit.layer + 1} of {total}"
            print(
                f"{done}: {len(fit.matrices)} matrices, {seconds:.0f} s",
                file=sys.stderr,
                flush=True,
            )
        yield fit
        start = time.monotonic()


# ----------------------------------------------------------------------------------------- matrices


def find_matrices(config: ModelConfig, directory: pathlib.Path) -> list[list[WeightMatrix]]:
    """Returns the matrices of every layer, after checking all names and shapes on disk."""
    tensors = read_headers(directory)
    abstract = abstract_params(Decoder(config, DecoderOptions()))
    layers = {layer.key: layer for layer in config.layers()}
    by_layer: list[list[WeightMatrix]] = [[] for _ in layers]
    for key, slot in match_keys(config, tensors, abstract).items():
        if slot.index:
            layer = layers[(*slot.path[:2], slot.index[0])]
            matrices = [
                matrix
                for matrix in layer.config.matrices(config.width)
                if matrix.kind != ROUTER and matrix.leaf == slot.path[2:]
            ]
            by_layer[layer.number] += _matrices_in(key, slot, tensors[key], layer.number, matrices)
    for found in by_layer:
        found.sort(key=lambda each: (each.expert or 0, ROLES.index(each.role)))
    return by_layer


def _matrices_in(
    key: str, slot: Slot, info: TensorInfo, layer: int, matrices: list[Matrix]
) -> Iterator[WeightMatrix]:
    """Yields the matrices of one tensor, of those in its leaf; none for a norm, bias or router."""
    matrices = [each for each in matrices if slot.half is None or each.half == slot.half]
    if not matrices:
        return
    *stacked, rows, columns = info.shape
    rows //= len(matrices)
    is_fused = len(matrices) > 1  # one above the other
    parts = [(slice(i * rows, (i + 1) * rows),) if is_fused else () for i in range(len(matrices))]
    for expert in range(stacked[0]) if stacked else slot.index[1:] or (None,):
        for matrix, part in zip(matrices, parts, strict=True):
            index = (expert, *part) if stacked else part
            yield WeightMatrix(layer, matrix.role, expert, key, info.file, index, (rows, columns))


def read_matrix(matrix: WeightMatrix) -> np.ndarray:
    """Reads one matrix as on disk, [out, in]; of a tensor that holds several only this one is
    read.
    """
    with open_weights(matrix.file) as handle:
        return handle.get_slice(matrix.key)[matrix.index or slice(None)]


def _spectrum(matrix: WeightMatrix) -> np.ndarray:
    with _naming(matrix):
        return eigenvalues(read_matrix(matrix))


def _fit(matrix: WeightMatrix, eigenvalues_N: np.ndarray, estimator: Estimator) -> TailFit:
    with _naming(matrix):
        return fit_tail(eigenvalues_N, estimator)


@contextlib.contextmanager
def _naming(matrix: WeightMatrix) -> Iterator[None]:
    """Adds the name of the matrix to an error about its exponent."""
    try:
        yield
    except UserError as error:
        expert = "" if matrix.expert is None else f" of expert {matrix.expert}"
        place = f"{matrix.role}{expert} in layer {matrix.layer}"
        raise UserError(f"{matrix.file}, {matrix.key} ({place}): {error}") from error


# -------------------------------------------------------------------------------------------- cache


def _identity(directory: pathlib.Path, cache: pathlib.Path | None) -> str:
    """Returns the model's fingerprint; the older one if spectra are stored under it."""
    if cache:
        older = legacy_fingerprint(directory)
        if (cache / older[:32]).is_dir():
            return older
    return fingerprint(directory)


def default_cache() -> pathlib.Path:
    """Returns the default folder, below the user's cache folder."""
    return cache_folder("spectra")


def open_cache(path: str | None) -> pathlib.Path | None:
    """Returns the cache folder, created if needed. The analysis goes on without the default folder;
    one that the user named must be writable.
    """
    folder = default_cache() if path is None else local_path(path, "--cache")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = None if os.access(folder, os.W_OK) else "no permission"
    except OSError as error:
        reason = error.strerror
    if reason is None:
        return folder
    if path is not None:
        raise UserError(f"--cache {path} cannot be written: {reason}; give another directory.")
    print(f"no cache    {folder} cannot be written: {reason}", file=sys.stderr)
    return None


def _digest(spectra: dict[str, np.ndarray], identity: str) -> str:
    digest = hashlib.sha256(f"{METHOD}\n{identity}\n".encode())
    for name, values_N in sorted(spectra.items()):
        digest.update(f"{name} {values_N.dtype} {values_N.shape}\n".encode())
        digest.update(values_N.tobytes())
    return digest.hexdigest()


def _load(
    file: pathlib.Path, matrices: list[WeightMatrix], identity: str
) -> dict[str, np.ndarray] | None:
    """Returns the spectra of a layer, or None unless the file holds exactly these, undamaged."""
    try:
        with safe_open(file, framework="numpy") as handle:
            stored = (handle.metadata() or {}).get("sha256")
            spectra = {name: handle.get_tensor(name) for name in handle.keys()}
    except (OSError, SafetensorError):
        return None
    if stored != _digest(spectra, identity):
        return None
    expected = {matrix.name: (min(matrix.shape),) for matrix in matrices}
    found = {name: values_N.shape for name, values_N in spectra.items()}
    return spectra if found == expected else None


def _store(file: pathlib.Path, spectra: dict[str, np.ndarray], identity: str) -> None:
    """Writes a file whole or not at all, also when two processes write the same one."""
    data = save(spectra, metadata={"sha256": _digest(spectra, identity)})
    draft = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(data)
        os.replace(draft, file)
    except OSError as error:
        raise RunError(
            f"{file} cannot be written: {error.strerror}. The layers before it are kept; give "
            "another --cache, or --no-cache."
        ) from error
