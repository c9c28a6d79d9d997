"""Strictness for every test: dtype and rank promotion are errors, warnings are errors, several CPU devices."""

import os
from pathlib import Path

# Before JAX starts: four devices, so that sharding is tested as it runs on several chips.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What one file's tests compile, other files, other processes and the next run read from disk (`pytest --cache-clear`
# removes it): the same tests again take a quarter of the time.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "d" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# The exact matmul: parity with other libraries is judged in fp32.
jax.config.update("jax_default_matmul_precision", "highest")
# Compiling is most of what tests take, XLA's costliest passes a third of that. Processes that tests start keep them,
# as users have them, and so do files that compare two programs to the last digits or follow a search;
# `JAX_DISABLE_MOST_OPTIMIZATIONS=0 python -m pytest` keeps them everywhere.
SKIP_PASSES = "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ
LAST_DIGITS = ("test_lorahub", "test_specializer")


@pytest.fixture(autouse=True, scope="module")
def _compiler(request):
    if SKIP_PASSES:
        jax.config.update("jax_disable_most_optimizations", request.path.stem not in LAST_DIGITS)
    yield
    jax.clear_caches()  # which also bounds the memory of what was compiled


# Files whose tests start training jobs or train for long. Begun last, one of them would run while the other process of
# the tests has nothing left to do.
LONG = (
    "test_resume",
    "test_distributed",
    "test_bucket",
    "test_quickstart",
    "test_pocket_pair",
    "test_efficiency",
    "test_compile",
)


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))
