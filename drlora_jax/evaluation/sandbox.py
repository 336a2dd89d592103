"""Runs an untrusted program in a child process with new Linux namespaces.

The program sees a read-only root with only the interpreter and system libraries, an empty directory
in memory, four devices, an empty environment, no network (not even loopback), no other process and
no file of the user. It runs as uid 65534 without capabilities. `Limits` apply to each process and,
monitored from outside, to all of them together.

`Sandbox()` first runs a probe inside that tries to escape and reads its limits. If any barrier is
missing it raises UserError; there is no weaker way to run a program. This contains mistakes and
ordinary malice; it is no defence against kernel vulnerabilities. A program cannot pass by exiting
early, but one that searches its interpreter's memory could forge its verdict: scores assume code
that tries to solve the task.
"""

import json
import os
import pathlib
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from typing import NamedTuple

from drlora_jax.errors import UserError

_CHILD = pathlib.Path(__file__).with_name("sandbox_child.py")
_PROBE = pathlib.Path(__file__).with_name("sandbox_probe.py")
GRACE_SECONDS = 5  # for set-up, in addition to the program's own time


class Limits(NamedTuple):
    cpu_seconds: int = 10  # per process
    wall_seconds: int = 15
    memory_bytes: int = 1 << 30  # address space per process, and resident memory of all together
    processes: int = 32
    file_bytes: int = 10_000_000  # per file
    disk_bytes: int = 32_000_000  # for all files together


LIMITS = Limits()


class Outcome(NamedTuple):
    verdict: str  # "passed", "failed", "timed out" or "limited"
    detail: str  # the exception, or the limit

    @property
    def is_passed(self) -> bool:
        return self.verdict == "passed"


class Sandbox:
    """Runs programs; creating an instance verifies the isolation."""

    def __init__(self, limits: Limits = LIMITS):
        self.limits = limits
        reason = "it is not Linux" if sys.platform != "linux" else self._probe()
        if reason:
            raise UserError(
                "Programs written by a model run only in Linux namespaces, which this machine does "
                f"not provide: {reason}. Run this task where user namespaces are allowed (Linux "
                "5.12 or newer; in a container, one that may create them), or leave it out."
            )

    def run(self, program: str) -> Outcome:
        """Runs a program to its end; `passed` means that its last line was reached."""
        outcome = _run(program, self.limits)
        if outcome.verdict == "unavailable":
            # The probe had succeeded: the machine is now out of processes or memory.
            raise UserError(f"The isolation of programs stopped working: {outcome.detail}.")
        return outcome

    def _probe(self) -> str:
        """Returns why a program would not be isolated; empty if it is."""
        with socket.socket() as server, tempfile.NamedTemporaryFile() as secret:
            server.bind(("127.0.0.1", 0))
            server.listen(1)
            facts = {
                "port": server.getsockname()[1],
                "secret": secret.name,
                "home": str(pathlib.Path.home()),
                "limits": self.limits._asdict(),
            }
            program = f"FACTS = {facts!r}\n" + _PROBE.read_text(encoding="utf-8")
            outcome = _run(program, self.limits)
        return "" if outcome.is_passed else f"{outcome.verdict}: {outcome.detail}"


def _run(program: str, limits: Limits) -> Outcome:
    try:
        program.encode()
    except UnicodeEncodeError:
        return Outcome("failed", "not a text of Unicode characters")
    order = {"program": program, "limits": limits._asdict(), "nonce": secrets.token_hex(16)}
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", str(_CHILD)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={},
        cwd="/",
        start_new_session=True,
    )
    try:
        out, error = child.communicate(
            json.dumps(order).encode(), timeout=limits.wall_seconds + GRACE_SECONDS
        )
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)  # also kills the supervisor and everything inside
        child.communicate()
        return Outcome("timed out", f"after {limits.wall_seconds + GRACE_SECONDS} s")
    try:
        return Outcome(**json.loads(out))
    except (ValueError, TypeError):
        reason = (error.decode("utf-8", "replace").strip().splitlines() or ["no answer"])[-1]
        return Outcome("unavailable", reason)
