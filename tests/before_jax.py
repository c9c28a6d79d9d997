"""The environment that tests compute in, and the processes they start; to be imported before JAX is."""

import os
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# What one file's tests compile, other files, other processes and the next run read from disk (`pytest --cache-clear`
# removes it), however short it took: an operation on arrays takes 18 ms at first, 10 ms of them without the compiler.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "d" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

GIVEN = os.environ.setdefault("LORA_GEN_TEST_XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
"""The user's own flags. xdist's processes inherit them from the one that has set the others."""

QUICK = "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ
"""Whether to compile for little time of the compiler, which is most of what tests take.

Without XLA's costliest passes, with its older code generator for CPUs and one LLVM module at a time, the gradient of
the decoder of `helpers.py` takes 0.3 s instead of 2.8 s. `JAX_DISABLE_MOST_OPTIMIZATIONS=0 python -m pytest` compiles
everything as users do; some processes that tests start always do (`Jobs.compiled_as_users`, test_server_process.py).
"""

_quick = ""
if QUICK and version("jaxlib").startswith("0.10."):  # XLA ends a process that has a flag it does not know
    _quick = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
COMPILE_QUICKLY = {"XLA_FLAGS": f"{GIVEN} {_quick}"} | ({"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"} if QUICK else {})
"""For the environment of a process that compiles as tests do."""

# Four devices, so that sharding is tested as it runs on several chips.
os.environ["XLA_FLAGS"] = f"{COMPILE_QUICKLY['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
