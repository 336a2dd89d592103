"""The compiled kernels of the CPU: C++ in this folder, built with the machine's own compiler when
first used, for its own instructions, and kept in the user's cache directory.

A machine without a compiler computes with XLA's operations alone; nothing else depends on this.
"""

import concurrent.futures
import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shutil
import subprocess
import tempfile

import jax

FOLDER = pathlib.Path(__file__).parent
SOURCES = ("matmul.cc", "experts.cc", "attention.cc")
TARGETS = ("ExpertsForward", "ExpertsBackward", "AttentionForward", "AttentionBackward")
COMPILERS = ("c++", "g++", "clang++")
LONGEST_BUILD = 300  # seconds
MOST_PARTS = 16  # each takes memory for a sum of its own over all tokens


def why_not() -> str | None:
    """Why there are no compiled kernels here, or None. The first call builds and registers them."""
    return _registered()[1]


def target(name: str) -> str:
    """The name under which XLA calls one of `TARGETS`. It changes with the code, so that a program
    kept by jax's compilation cache never meets other kernels than its own.
    """
    return f"drlora_{name}_{_registered()[0]}"


@functools.cache
def parts() -> int:
    """Into how many parts work is divided; results depend on it. Not above the cores there are."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return min(cores, MOST_PARTS)


@functools.cache
def _registered() -> tuple[str, str | None]:
    """(key of the build, why there is none)."""
    compiler = _compiler()
    if compiler is None:
        return "", f"no C++ compiler was found ({', '.join(COMPILERS)}, or what CXX names)"
    try:
        command = _command(compiler)
        key = _key(command)
        library = ctypes.CDLL(str(_built(command, key)))
        for name in TARGETS:
            function = jax.ffi.pycapsule(getattr(library, f"Drlora{name}"))
            jax.ffi.register_ffi_target(f"drlora_{name}_{key}", function, platform="cpu")
    except (OSError, subprocess.SubprocessError) as error:
        lines = getattr(error, "stderr", None) or str(error)
        return "", f"{compiler} does not build them: {' '.join(lines.split())[:300]}"
    return key, None


def _compiler() -> str | None:
    wanted = os.environ.get("CXX")
    return next(filter(None, map(shutil.which, [wanted] if wanted else COMPILERS)), None)


def _command(compiler: str) -> list[str]:
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    machine = "-march=native" if is_x86 else "-mcpu=native"
    options = ["-std=c++17", "-O3", machine, "-ffp-contract=fast", "-fPIC", "-pthread"]
    # Not warned about: jaxlib's header is its own affair.
    return [compiler, *options, "-w", "-isystem", jax.ffi.include_dir()]


def _key(command: list[str]) -> str:
    """Of everything that the built file depends on: code, compiler, jaxlib's interface, processor."""
    digest = hashlib.sha256()
    for path in sorted(FOLDER.glob("*.h")) + [FOLDER / name for name in SOURCES]:
        digest.update(path.read_bytes())
    version = subprocess.run(
        [command[0], "--version"], capture_output=True, text=True, check=True, timeout=LONGEST_BUILD
    ).stdout
    for text in (*command, version, jax.lib.__version__, *_processor()):
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:16]


def _processor() -> list[str]:
    """What -march=native looks at: a home directory may be shared by different machines."""
    info = pathlib.Path("/proc/cpuinfo")
    if not info.is_file():
        return [platform.machine(), platform.processor()]
    names = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU part")
    lines = info.read_text().splitlines()
    return sorted({line for line in lines if line.split("\t")[0].split(":")[0].strip() in names})


def _built(command: list[str], key: str) -> pathlib.Path:
    """The library, from the cache directory or built now."""
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    folder = pathlib.Path(home, "drlora_jax", "native")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        is_kept = os.access(folder, os.W_OK)
    except OSError:
        is_kept = False
    path = folder / f"{key}.so"
    if path.is_file():
        return path
    # Built beside its place and moved there whole: several processes may do this at once.
    with tempfile.TemporaryDirectory(dir=folder if is_kept else None) as build:
        made = pathlib.Path(build, path.name)
        _build(command, made)
        if is_kept:
            os.replace(made, path)
            return path
        ctypes.CDLL(str(made))  # stays loaded, so the file may go
        return made


def _build(command: list[str], made: pathlib.Path) -> None:
    """Compiles the sources side by side and links them."""

    def run(*arguments: str) -> None:
        subprocess.run(
            [*command, *arguments], check=True, capture_output=True, text=True, timeout=LONGEST_BUILD
        )

    objects = [str(made.with_name(f"{name}.o")) for name in SOURCES]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        jobs = zip(SOURCES, objects, strict=True)
        list(pool.map(lambda job: run("-c", str(FOLDER / job[0]), "-o", job[1]), jobs))
    run("-shared", *objects, "-o", str(made))
