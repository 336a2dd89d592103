"""Faults of disks and of people in a run's checkpoints, drawn at random."""

import pathlib
import shutil

import numpy as np

NEWEST = 12  # the step that is damaged; 10 is before it


def flip_a_bit(checkpoint: pathlib.Path, draw: np.random.Generator) -> str:
    """One bit of one file: any file alike, or any byte alike."""
    files = [file for file in _files(checkpoint) if file.stat().st_size]
    sizes = np.array([file.stat().st_size for file in files], float)
    weights = sizes / sizes.sum() if draw.random() < 0.5 else np.full(len(files), 1 / len(files))
    file = files[draw.choice(len(files), p=weights)]
    content = bytearray(file.read_bytes())
    place, bit = int(draw.integers(len(content))), int(draw.integers(8))
    content[place] ^= 1 << bit
    file.write_bytes(bytes(content))
    return f"bit {bit} of byte {place} of {file.relative_to(checkpoint)}"


def truncate(checkpoint, draw):
    file = _any(checkpoint, draw)
    content = file.read_bytes()
    file.write_bytes(content[: int(draw.integers(len(content) + 1))])


def delete(checkpoint, draw):
    _any(checkpoint, draw).unlink()


def zero(checkpoint, draw):
    file = _any(checkpoint, draw)
    content = bytearray(file.read_bytes())
    start = int(draw.integers(max(len(content) - 32, 1)))
    content[start : start + 32] = bytes(len(content[start : start + 32]))
    file.write_bytes(bytes(content))


def empty_directory(checkpoint, draw):
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def stray_directory(checkpoint, draw):
    (checkpoint.parent / "99").mkdir()


def stray_file(checkpoint, draw):
    (checkpoint.parent / "99").write_text("")


def half_copied(checkpoint, draw):
    for file in _files(checkpoint)[::2]:
        file.unlink()


def swapped_files(checkpoint, draw):
    """One file, or the values beside the arrays, of the checkpoint before."""
    before = checkpoint.parent / "10"
    for file in _files(before):
        here = checkpoint / file.relative_to(before)
        if here.is_file() and draw.random() < 0.4:
            shutil.copy(file, here)


def an_older_one(checkpoint, draw):
    shutil.rmtree(checkpoint)
    shutil.copytree(checkpoint.parent / "10", checkpoint)


def a_foreign_one(checkpoint, draw):
    shutil.rmtree(checkpoint)
    shutil.copytree(checkpoint.parents[2] / "foreign" / "checkpoints" / checkpoint.name, checkpoint)


def broken_metrics(checkpoint, draw):
    """As older versions wrote them, beside every checkpoint."""
    for each in checkpoint.parent.iterdir():
        (each / "metrics").mkdir()
        (each / "metrics" / "metrics").write_bytes(draw.bytes(32))


FAULTS = (
    *(truncate, delete, zero) * 3,  # of several files
    empty_directory,
    stray_directory,
    stray_file,
    half_copied,
    swapped_files,
    swapped_files,
    an_older_one,
    a_foreign_one,
    broken_metrics,
)


def _files(checkpoint: pathlib.Path) -> list[pathlib.Path]:
    return sorted(file for file in checkpoint.rglob("*") if file.is_file())


def _any(checkpoint: pathlib.Path, draw: np.random.Generator) -> pathlib.Path:
    files = _files(checkpoint)
    return files[int(draw.integers(len(files)))]
