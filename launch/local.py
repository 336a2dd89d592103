#!/usr/bin/env python3
"""Runs one training as several processes on this machine, connected over localhost.

    python launch/local.py --processes 2 -- --config configs/tiny.py run.dir=runs/two mesh.data=2

All arguments after `--` go to every `python -m drlora_jax.train` (or, with `--module`, another
one: drlora_jax.evaluate). On CPU each process has `--devices` simulated devices. It is for trying
a launch before it goes to a cluster, and for tests; one process alone drives all GPUs or TPU chips
of a machine.

SIGTERM and SIGINT go to the processes, which save and stop at the same step. When one of them has
ended the others get `--grace` seconds, even if they hang. The exit code is 0 when all end with 0,
else that of the first that did not.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time


def main() -> int:
    args = _arguments()
    address = f"localhost:{args.port or _free_port()}"
    processes: list[subprocess.Popen] = []
    numbers: list[int] = []

    def forward(number, _):
        numbers.append(number)
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    for index in range(args.processes):
        processes.append(_start(index, address, args))
        if numbers:  # came meanwhile; without the others this process would wait for them
            forward(numbers[-1], None)
            break
    return _wait(processes, args.grace)


def _arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--devices", type=int, default=1, help="simulated CPU devices of a process")
    parser.add_argument("--port", type=int, help="of the coordinator; default: a free one")
    parser.add_argument("--grace", type=float, default=120, help="seconds; see above")
    parser.add_argument("--module", default="drlora_jax.train", help="default: %(default)s")
    parser.add_argument("arguments", nargs="+", metavar="argument", help="of the module")
    args = parser.parse_args()
    if args.processes < 1 or args.devices < 1:
        parser.error("--processes and --devices must be 1 or more")
    return args


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def _start(index: int, address: str, args) -> subprocess.Popen:
    environment = os.environ | {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(args.processes),
        "JAX_PROCESS_ID": str(index),
    }
    if environment.setdefault("JAX_PLATFORMS", "cpu") == "cpu":
        flags = environment.get("XLA_FLAGS", "")
        count = f"--xla_force_host_platform_device_count={args.devices}"
        environment["XLA_FLAGS"] = f"{flags} {count}".strip()
    command = [sys.executable, "-m", args.module, *args.arguments]
    # A group of its own: Ctrl-C reaches the processes once, from here.
    return subprocess.Popen(command, env=environment, start_new_session=True)


def _wait(processes: list[subprocess.Popen], grace: float) -> int:
    """Waits until all have ended; ends those that outlive the first one by `grace` seconds."""
    code, deadline = 0, None
    while None in (codes := [process.poll() for process in processes]):
        ended = [each for each in codes if each is not None]
        code = code or next(filter(None, ended), 0)
        if ended and deadline is None:
            deadline = time.monotonic() + grace
        if deadline is not None and time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.1)
    code = code or next(filter(None, codes), 0)
    return code if code >= 0 else 128 - code  # ended by a signal


if __name__ == "__main__":
    sys.exit(main())
