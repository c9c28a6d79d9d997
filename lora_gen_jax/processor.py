"""What this machine's processor can do, as far as it decides how to compute.

In: the kernel's list of the processor's features, and the instructions that `XLA_FLAGS` allows. Out: an answer that is
the same in every process of a run, and after every restart.
"""

import os
import re
from pathlib import Path

FEATURES = ("amx_bf16", "avx512_bf16")
"""Of x86: a matrix unit, and vector instructions, that multiply bfloat16 and sum in float32."""


def multiplies_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether products of bfloat16 with float32 sums are faster here than products of float32.

    Only x86 under Linux is known to: elsewhere the file is not there, or names other features. A limit in `XLA_FLAGS`
    (``--xla_cpu_max_isa=AVX2``) counts.
    """
    allowed = re.findall(r"--xla_cpu_max_isa=(\S+)", os.environ.get("XLA_FLAGS", ""))
    if allowed and "BF16" not in allowed[-1].upper() and "AMX" not in allowed[-1].upper():
        return False
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    flags = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return flags is not None and not set(FEATURES).isdisjoint(flags[1].split())
