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

jax.config.update("jax_numpy_rank_promotion", "raise")
# The exact matmul, where float32 is compared with other libraries.
jax.config.update("jax_default_matmul_precision", "highest")
# Compiling is most of what tests take, XLA's costliest passes a third of that. Processes that tests start keep them,
# as users have them; `JAX_DISABLE_MOST_OPTIMIZATIONS=0 python -m pytest` keeps them everywhere.
if "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ:
    jax.config.update("jax_disable_most_optimizations", True)


def _compute_in_double(double):
    jax.config.update("jax_enable_x64", double)
    jax.config.update("jax_numpy_dtype_promotion", "standard" if double else "strict")


_compute_in_double(False)


@pytest.fixture(autouse=True, scope="module")
def _numbers(request):
    """How a file's tests compute: `pytestmark = pytest.mark.float64` for those that compare programs with each other.

    Two programs for one function differ by rounding, and by how much depends on the processor and on the compiler. In
    float64 that is far below what any mistake makes (`helpers.SAME`). Strict promotion is of the numbers that users
    compute with: in float64 JAX counts in int64, and does not mix that with int32.
    """
    _compute_in_double(request.node.get_closest_marker("float64") is not None)
    yield
    _compute_in_double(False)  # fixtures of a session are made before those of the next file
    jax.clear_caches()  # which also bounds the memory of what was compiled


@pytest.fixture
def float32():
    """For what is said of float32 in a file that computes in float64."""
    with jax.enable_x64(False), jax.numpy_dtype_promotion("strict"):
        yield


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
