"""Freed memory stays in the process: a step of 64 MiB faults its pages in once, not every time."""

import platform
import subprocess
import sys

import pytest

from drlora_jax.system import host_memory

SCRIPT = """
import resource, statistics, sys
import jax, jax.numpy as jnp
from drlora_jax.system import host_memory

if sys.argv[1] == "keep":
    host_memory.run_on_calling_thread()
    assert host_memory.keep_freed_memory("cpu")

@jax.jit
def step(x):  # what a loop carries is in memory: 64 MiB
    carried = jnp.broadcast_to(x, (2**24,))
    return jax.lax.fori_loop(0, 2, lambda _, value: 2 * value + 1, carried).sum()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

x, each = jnp.ones(()), []
for _ in range(7):
    before = faults()
    step(x).block_until_ready()
    each.append(faults() - before)
print(statistics.median(each))
"""


def faults_of_a_step(how: str) -> float:
    command = [sys.executable, "-c", SCRIPT, how]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is told")
def test_a_step_finds_its_memory_again(monkeypatch):
    monkeypatch.delenv("JAX_CPU_ENABLE_ASYNC_DISPATCH", raising=False)
    monkeypatch.setenv("XLA_FLAGS", "")  # one device, as it trains
    pages = 64 * 2**20 // 4096
    assert faults_of_a_step("as is") > pages / 2
    assert faults_of_a_step("keep") < pages / 20


def test_accelerators_and_other_libraries_are_left_alone(monkeypatch):
    assert not host_memory.keep_freed_memory("gpu")
    monkeypatch.setattr(host_memory.python_platform, "libc_ver", lambda: ("", ""))
    assert not host_memory.keep_freed_memory("cpu")


def test_the_users_choice_of_thread_is_kept(monkeypatch):
    given = []
    monkeypatch.setattr(host_memory.jax.config, "update", lambda *change: given.append(change))
    monkeypatch.setenv("JAX_CPU_ENABLE_ASYNC_DISPATCH", "1")
    host_memory.run_on_calling_thread()
    assert given == []
    monkeypatch.delenv("JAX_CPU_ENABLE_ASYNC_DISPATCH")
    host_memory.run_on_calling_thread()
    assert given == [("jax_cpu_enable_async_dispatch", False)]
