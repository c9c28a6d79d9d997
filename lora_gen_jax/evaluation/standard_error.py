"""The standard error of a mean, as lm-evaluation-harness has it."""

from collections.abc import Sequence

import numpy as np


def standard_error(values: Sequence[float]) -> float:
    """Standard deviation (n - 1 degrees of freedom) over √n; 0 for a single value."""
    n = len(values)
    return float(np.std(values, ddof=1) / np.sqrt(n)) if n > 1 else 0.0
