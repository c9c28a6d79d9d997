"""The picture of a comparison: accuracy against latency, and the gates of a few tasks.

In: a report and gates [L, E] by task. Out: a PNG. The whole report is made in `lora_gen_jax.lab.report`.
"""

from pathlib import Path
from typing import Any

import numpy as np

from lora_gen_jax.lab.report.accuracy import draw_comparison
from lora_gen_jax.lab.report.gates import draw_maps
from lora_gen_jax.lab.report.style import evenly, grid, new_figure, save

# Tasks whose gates are drawn.
SHOWN_TASKS = 6


def draw_report(report: dict[str, Any], gates: dict[str, np.ndarray] | None, path: Path) -> None:
    """Draws and writes the picture; without gates only the first part."""
    shown = evenly(list(gates or {}), SHOWN_TASKS)
    figure: Any = new_figure(13 if shown else 6.5, 5.4)
    left, *right = figure.subfigures(1, 2, width_ratios=(1, 1.2)) if shown else (figure,)
    draw_comparison(left.add_subplot(), report)
    left.legend(loc="outside lower center", ncols=2, fontsize=9)
    if gates and shown:
        draw_maps(right[0], {name: gates[name] for name in shown}, *grid(len(shown), 2))
        right[0].suptitle("what the prompt became", fontsize=10)
    save(figure, path)
