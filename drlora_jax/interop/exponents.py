"""The heavy-tail exponents of a model's layers and experts, for policies that ask for them.

They come from a file that `python -m drlora_jax.alpha --out` wrote, of this very model, or are
computed from the weights, one matrix at a time, with the spectra kept in the same cache as that
command keeps them in: what it has analysed takes seconds.
"""

import json
import pathlib
from collections.abc import Sequence

import numpy as np

from drlora_jax.allocation.spectra import Estimator, Exponents
from drlora_jax.errors import UserError
from drlora_jax.interop.hf_files import fingerprint, same_base
from drlora_jax.interop.spectra_read import fit_layers, open_cache, with_progress
from drlora_jax.models.architecture import ModelConfig
from drlora_jax.system.paths import FILE, check_downloaded, kind_of, local_path

Found = list[tuple[int | None, float]]  # of a layer's matrices: whose expert's, and the exponent


def read_exponents(
    config: ModelConfig,
    directory: pathlib.Path,
    layers: tuple[int, ...],
    *,
    file: str | None,
    estimator: Estimator,
) -> Exponents:
    """Returns the exponents of the model in `directory`.

    Args:
      layers: model layer indices of the layers with experts, the L axis.
      file: of `drlora_jax.alpha --out`; None: from the weights or their cached spectra.

    Raises:
      UserError: a file that is not there, not whole, or of another model or estimator; a matrix
        without an exponent.
    """
    if file is None:
        fits = fit_layers(config, directory, estimator=estimator, cache=open_cache(None))
        by_layer = [
            [(matrix.expert, fit.alpha) for matrix, fit in layer.matrices]
            for layer in with_progress(fits, config.num_layers)
        ]
    else:
        by_layer = _from_file(file, directory, config.num_layers, estimator)
    chosen = [by_layer[layer] for layer in layers]
    layer_L = np.array([np.mean([alpha for _, alpha in found]) for found in chosen])
    experts = config.moe.routing.num_experts if config.moe else 0
    return Exponents(layer_L, _by_expert(chosen, experts))


def _by_expert(chosen: Sequence[Found], experts: int) -> np.ndarray | None:
    """Returns exponents [L, E], or None if some expert has no matrix of its own."""
    alphas = [
        [[alpha for owner, alpha in found if owner == expert] for expert in range(experts)]
        for found in chosen
    ]
    if not all(each for found in alphas for each in found):
        return None
    return np.array([[np.mean(each) for each in found] for found in alphas])


def _from_file(path: str, directory: pathlib.Path, layers: int, estimator: str) -> list[Found]:
    file = local_path(path, "allocation.alpha_file")
    kind = kind_of(file)
    if kind != FILE:
        raise _refused(path, f"it is {kind}")
    check_downloaded(file)
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        found = [
            [(matrix["expert"], float(matrix["alpha"])) for matrix in layer["matrices"]]
            for layer in stored["layers"]
        ]
        of, by = stored["fingerprint"], stored["estimator"]
    except (ValueError, KeyError, TypeError, RecursionError, OSError) as error:
        raise _refused(path, f"it cannot be read as exponents ({error})") from error
    if not same_base({"base_fingerprint": of}, directory):
        here = fingerprint(directory)[:12]
        raise _refused(path, f"it was computed for fingerprint {of[:12]}, not {here}")
    if by != estimator:
        raise _refused(path, f"its estimator is {by}, but allocation.alpha_estimator {estimator}")
    is_whole = len(found) == layers and all(found)
    if not is_whole or not all(np.isfinite(a) and a > 1 for layer in found for _, a in layer):
        raise _refused(path, f"it must have exponents above 1 for {layers} layers")
    return found


def _refused(path: str, reason: str) -> UserError:
    return UserError(
        f"allocation.alpha_file={path} cannot be used: {reason}. Write it with python -m "
        "drlora_jax.alpha MODEL --experts N --out FILE, or omit it to compute the exponents."
    )
