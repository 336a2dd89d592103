"""Locks a run directory, so that one process at a time writes it.

The lock is the kernel's (`flock`), so it ends with its process, however that ends. The file names
its holder, for the message. If the file system has no locks, that content decides instead: a
process that is alive on this host holds the directory, anything else is a leftover. Reading a run
directory needs no lock.
"""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import socket
from collections.abc import Iterator

from drlora_jax.errors import UserError

LOCK_NAME = "run.lock"
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def hold_lock(directory: pathlib.Path) -> Iterator[None]:
    """Holds the directory's lock; refuses if another live process holds it or it cannot be
    written.
    """
    file = directory / LOCK_NAME
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(file, directory)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(_own()).encode(), 0)
    except OSError as error:
        raise UserError(
            f"run.dir={directory} cannot be written: {error.strerror}; give another run.dir."
        ) from error
    try:
        yield
    finally:
        file.unlink(missing_ok=True)  # before the release: nobody can hold a file that is gone
        os.close(descriptor)


def _acquire(file: pathlib.Path, directory: pathlib.Path) -> int:
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
        try:
            _lock(descriptor, directory)
        except BaseException:
            os.close(descriptor)
            raise
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(file), os.fstat(descriptor)):
                return descriptor
        os.close(descriptor)  # its last holder removed the file between our two calls: retry


def _lock(descriptor: int, directory: pathlib.Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    except BlockingIOError:
        owner = _owner(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        owner = _owner(descriptor)
        if not _is_alive_here(owner):
            return
    who = f"process {owner['pid']} on {owner['host']}" if owner else "another process"
    raise UserError(
        f"run.dir={directory} is in use by {who}; wait for it, stop it, or give another run.dir."
    )


def _own() -> dict:
    pid = os.getpid()
    return {"pid": pid, "host": socket.gethostname(), "started": _start_time(pid)}


def _owner(descriptor: int) -> dict:
    """Reads the owner from the file; empty if there is none, as in the moment before it is
    written.
    """
    try:
        values = json.loads(os.pread(descriptor, 4096, 0))
        return values if {"pid", "host", "started"} <= values.keys() else {}
    except (ValueError, AttributeError):
        return {}


def _is_alive_here(owner: dict) -> bool:
    """Returns whether that very process runs on this host: its number may have been reused."""
    if owner.get("host") != socket.gethostname() or not isinstance(owner["pid"], int):
        return False
    try:
        os.kill(owner["pid"], 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it belongs to another user
        return True
    return owner["started"] == _start_time(owner["pid"])


def _start_time(pid: int) -> str:
    """Returns when a process started, in the kernel's clock; "" if the system does not say."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[19]
