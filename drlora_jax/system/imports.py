"""Imports heavy packages only where they are needed: reading JSON lines needs none of them."""

import importlib
import types

from drlora_jax.errors import UserError


def load_package(name: str, purpose: str, install: str | None = None) -> types.ModuleType:
    """Imports a package, or says which pip command installs it (`install` is pip's argument)."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        # The message has the reason: an installed package with a broken dependency also fails
        # here, and one with a broken shared library raises OSError.
        package = name.partition(".")[0]
        raise UserError(
            f"{purpose} needs the package {package} ({error}): pip install {install or package}"
        ) from error
