"""Strictness for every test: dtype and rank promotion are errors, warnings are errors, several CPU devices."""

import gc

import before_jax  # before JAX starts
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
# The exact matmul, where float32 is compared with other libraries.
jax.config.update("jax_default_matmul_precision", "highest")
if before_jax.QUICK:
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


@pytest.fixture
def float64():
    """For a comparison of two programs in a file that computes in float32."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
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


def pytest_collection_finish():
    """What was imported stays: the collector need not look through it each time that compiling made many objects."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))
