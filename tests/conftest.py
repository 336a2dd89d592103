"""Eight simulated CPU devices for every test, and the rank-promotion rule that our code keeps.

Compiling is most of the time of these tests; without LLVM's optimisation it takes half of it and
computes the same up to rounding. What was compiled is kept for the session, for the commands that
tests start and for runs that are resumed: a directory for each worker, because jax does not lock.
"""

import atexit
import gc
import importlib.metadata
import os
import shutil
import tempfile

FLAGS = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
# Programs this small compile in less time in one piece, and there is one worker a core.
FLAGS.append("--xla_cpu_parallel_codegen_split_count=1")
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # Its older emitters compile in half the time; later versions do not have them any more.
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])
os.environ.setdefault("JAX_PLATFORMS", "cpu")
KEPT = tempfile.mkdtemp(prefix="drlora-tests-")
atexit.register(shutil.rmtree, KEPT, ignore_errors=True)
os.environ |= {
    "JAX_COMPILATION_CACHE_DIR": KEPT,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
}

# jax keeps millions of objects; to look at all of them again and again was a twelfth of the time.
gc.set_threshold(10_000, 20, 100)

import jax  # noqa: E402  (the flags above must be set first)
import pytest  # noqa: E402

# Files of minutes come first, so that no worker starts one when the others are done.
LONG = ("test_processes", "test_train", "test_generation", "test_mesh", "test_policy_matrix")
LONG += ("test_adapters", "test_experiments", "test_errors")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture(autouse=True)
def no_silent_broadcasting():
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(scope="module")
def oracle():
    """The generator; torch exists for some Pythons only, and not for every machine."""
    for name in ("torch", "peft"):
        pytest.importorskip(name, reason="live comparison; stored results are compared above")
    from tests.oracles import make_oracles

    return make_oracles
