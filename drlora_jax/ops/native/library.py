"""The compiled kernels of the CPU: C++ in this folder, built with the machine's own compiler when
first used, for its own instructions, and kept in the user's cache directory.

A machine without a compiler computes with XLA's operations alone; nothing else depends on this.
CXX and CXXFLAGS are respected.
"""

import concurrent.futures
import ctypes
import functools
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import tempfile

import jax

FOLDER = pathlib.Path(__file__).parent
SOURCES = ("matmul.cc", "experts.cc", "attention.cc")
TARGETS = ("ExpertsForward", "ExpertsBackward", "AttentionForward", "AttentionBackward")
COMPILERS = ("c++", "g++", "clang++")
LONGEST_BUILD = 300  # seconds
MOST_PARTS = 16  # each takes memory for sums of its own over all tokens


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
    """Into how many parts work is divided: as many as this process has cores, within bounds. The
    last digits of results depend on it.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return min(cores, MOST_PARTS)


@functools.cache
def _registered() -> tuple[str, str | None]:
    """(key of the build, why there is none)."""
    wanted = os.environ.get("CXX")
    compiler = _compiler()
    if compiler is None:
        looked_for = f"CXX={wanted}" if wanted else ", ".join(COMPILERS)
        return "", f"no C++ compiler was found ({looked_for})"
    try:
        command = _command(compiler)
        key = _key(command)
        library = ctypes.CDLL(str(_built(command, key)))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        return "", f"{compiler[0]} does not build them: {' '.join(said.split())[:300]}"
    for name in TARGETS:
        function = jax.ffi.pycapsule(getattr(library, f"Drlora{name}"))
        jax.ffi.register_ffi_target(f"drlora_{name}_{key}", function, platform="cpu")
    return key, None


def _compiler() -> list[str] | None:
    """The command that CXX names, or the first that is there."""
    candidates = [shlex.split(os.environ["CXX"])] if os.environ.get("CXX") else None
    candidates = candidates or [[name] for name in COMPILERS]
    return next((command for command in candidates if shutil.which(command[0])), None)


def _command(compiler: list[str]) -> list[str]:
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    machine = "-march=native" if is_x86 else "-mcpu=native"
    options = ["-std=c++17", "-O3", machine, "-ffp-contract=fast", "-fPIC", "-pthread"]
    options += shlex.split(os.environ.get("CXXFLAGS", ""))
    # No warnings: a user could do nothing about them.
    return [*compiler, *options, "-w", "-isystem", jax.ffi.include_dir()]


def _key(command: list[str]) -> str:
    """Of all that the built file depends on: code, compiler, jaxlib's interface, processor."""
    digest = hashlib.sha256()
    for path in sorted(FOLDER.glob("*.h")) + [FOLDER / name for name in SOURCES]:
        digest.update(path.read_bytes())
    version = _run([command[0], "--version"])
    for text in (*command, version, importlib.metadata.version("jaxlib"), *_processor()):
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:16]


def _processor() -> list[str]:
    """What -march=native looks at: a home directory may be shared by different machines."""
    info = pathlib.Path("/proc/cpuinfo")
    if not info.is_file():
        return [platform.machine(), platform.processor()]
    names = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU part")
    lines = info.read_text().splitlines()
    return sorted({line for line in lines if line.partition(":")[0].strip() in names})


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
