"""The compiled kernels of the CPU: C++ in this folder, built with the machine's own compiler when
first used, for its own instructions, and kept in the user's cache directory.

A machine without a compiler computes with XLA's operations alone; nothing else depends on this. CXX
names another compiler, DRLORA_CXXFLAGS further options. (CXXFLAGS are for other programs: what they
often hold, such as the oldest processor that is to be served, would be wrong here.)
"""

import concurrent.futures
import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from typing import NamedTuple

import jax
import jax.numpy as jnp

from drlora_jax.system.paths import cache_folder

FOLDER = pathlib.Path(__file__).parent
SOURCES = ("matmul.cc", "experts.cc", "attention.cc")
TARGETS = ("ExpertsForward", "ExpertsBackward", "AttentionForward", "AttentionBackward")
COMPILERS = ("c++", "g++", "clang++")
LONGEST_BUILD = 300  # seconds
MOST_PARTS = 16  # each takes memory for sums of its own over all tokens


class Kernels(NamedTuple):
    """The kernels of this machine."""

    # `TARGETS` to the names under which XLA calls them. These change with the code, so that a
    # program kept by jax's compilation cache never meets kernels of another version.
    targets: dict[str, str]
    reason: str | None = None  # why there are none


def why_not() -> str | None:
    """Returns why there are no compiled kernels here, or None."""
    return kernels().reason


@functools.cache
def cannot(platform: str, dtype) -> str | None:
    """Returns why the kernels cannot compute in `dtype` in programs compiled for `platform`, or
    None.
    """
    if platform != "cpu":
        return f"its kernels are for CPUs, not for {platform}"
    if dtype != jnp.float32:
        return f"its kernels compute in float32, not in {jnp.dtype(dtype).name}"
    return why_not()


@functools.cache
def parts() -> int:
    """Into how many parts work is divided: as many as this process has cores, within bounds. The
    last digits of results depend on it.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return min(cores, MOST_PARTS)


@functools.cache
def kernels() -> Kernels:
    """Builds and registers the kernels at the first call."""
    wanted = os.environ.get("CXX", "").strip()
    try:
        compiler = _compiler(wanted)
        if compiler is None:
            listed = f"CXX={wanted}" if wanted else _listed()
            return Kernels({}, f"no C++ compiler was found ({listed})")
        command = _command(compiler)
        key = _key(compiler, command)
        library = _loaded(command, key)
        functions = [getattr(library, f"Drlora{name}") for name in TARGETS]
    except (OSError, subprocess.SubprocessError, ValueError, AttributeError) as error:
        said = getattr(error, "stderr", None) or str(error)
        said = said.decode(errors="replace") if isinstance(said, bytes) else said
        return Kernels({}, f"they cannot be built or loaded: {' '.join(said.split())[:300]}")
    targets = {name: f"drlora_{name}_{key}" for name in TARGETS}
    for target, function in zip(targets.values(), functions, strict=True):
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(function), platform="cpu")
    return Kernels(targets)


def _listed() -> str:
    return ", ".join(COMPILERS)


def _compiler(wanted: str) -> list[str] | None:
    """The command that is wanted, or the first compiler that is there."""
    candidates = [shlex.split(wanted)] if wanted else [[name] for name in COMPILERS]
    return next((command for command in candidates if shutil.which(command[0])), None)


def _command(compiler: list[str]) -> list[str]:
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    machine = "-march=native" if is_x86 else "-mcpu=native"
    options = ["-std=c++17", "-O3", machine, "-ffp-contract=fast", "-fPIC", "-pthread"]
    options += shlex.split(os.environ.get("DRLORA_CXXFLAGS", ""))
    # No warnings: a user could do nothing about them.
    return [*compiler, *options, "-w", "-isystem", jax.ffi.include_dir()]


def _key(compiler: list[str], command: list[str]) -> str:
    """Of all that the built file depends on: code, compiler, jaxlib's interface, processor."""
    digest = hashlib.sha256()
    for path in sorted(FOLDER.glob("*.h")) + [FOLDER / name for name in SOURCES]:
        digest.update(path.read_bytes())
    version = _run([*compiler, "--version"])
    for text in (*command, version, importlib.metadata.version("jaxlib"), *_machine()):
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:16]


def _machine() -> list[str]:
    """What -march=native looks at, and the C library: machines may share a home directory."""
    about = [platform.machine(), platform.processor(), *platform.libc_ver()]
    info = pathlib.Path("/proc/cpuinfo")
    if info.is_file():
        names = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU part")
        lines = info.read_text().splitlines()
        about += sorted({line for line in lines if line.partition(":")[0].strip() in names})
    return about


def _loaded(command: list[str], key: str) -> ctypes.CDLL:
    """The library, from the cache directory or built now."""
    folder = _cache_folder()
    path = folder / f"{key}.so" if folder else None
    if path and path.is_file():
        with contextlib.suppress(OSError):  # one that does not load is made again
            return ctypes.CDLL(str(path))
    with tempfile.TemporaryDirectory(dir=folder) as build:
        made = pathlib.Path(build, f"{key}.so")
        _build(command, made)
        library = ctypes.CDLL(str(made))  # stays loaded, so the file may move
        if path:
            os.replace(made, path)  # whole at once: several processes may build
        return library


def _cache_folder() -> pathlib.Path | None:
    """A directory that this user, and nobody else, can write; None where there is none."""
    try:
        folder = cache_folder("native")
        if not folder.is_absolute():
            return None
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = folder.stat()
    except OSError:
        return None
    is_own = not hasattr(os, "getuid") or about.st_uid == os.getuid()
    is_shared = about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return folder if is_own and not is_shared and os.access(folder, os.W_OK) else None


def _build(command: list[str], made: pathlib.Path) -> None:
    """Compiles the sources side by side and links them."""
    objects = [str(made.with_name(f"{name}.o")) for name in SOURCES]
    steps = [
        [*command, "-c", str(FOLDER / name), "-o", out]
        for name, out in zip(SOURCES, objects, strict=True)
    ]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(_run, steps))
    _run([*command, "-shared", *objects, "-o", str(made)])


def _run(command: list[str]) -> str:
    return subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=LONGEST_BUILD
    ).stdout
