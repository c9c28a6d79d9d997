"""The picture of a comparison: accuracy against latency, and the gates of a few tasks.

In: a report and gates [L, E] by task. Out: a PNG.
"""

from pathlib import Path
from typing import Any

import numpy as np

# Tasks whose gates are drawn.
SHOWN_TASKS = 6
COLORS = {"base": "#888888", "icl": "#4477aa", "lora": "#ccbb44", "lora_gen": "#cc3311", "shuffled": "#aa3377"}


def draw_report(
    report: dict[str, Any], titles: dict[str, str], gates: dict[str, np.ndarray] | None, path: Path
) -> None:
    """Draws and writes the picture; without gates only the first part."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = dict(list((gates or {}).items())[:: max(1, len(gates or {}) // SHOWN_TASKS)][:SHOWN_TASKS])
    figure: Any = plt.figure(figsize=(13, 5) if shown else (6, 5), layout="constrained")
    left, *right = figure.subfigures(1, 2, width_ratios=(1, 1.2)) if shown else (figure,)
    draw_accuracy(left, report, titles)
    if shown:
        draw_gates(right[0], shown)
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=110)
    plt.close(figure)
    temporary.replace(path)


def draw_accuracy(figure: Any, report: dict[str, Any], titles: dict[str, str]) -> None:
    """One point a method and group of tasks: latency, accuracy with its standard error."""
    axes = figure.add_subplot()
    for group, rows in report.items():
        for method, row in rows.items():
            color = COLORS[method]
            axes.errorbar(
                row["latency_ms"],
                100 * row["accuracy"],
                yerr=100 * row["stderr"],
                marker="o",
                markersize=9,
                color=color,
                markerfacecolor="none" if group == "seen" else color,
                linestyle="none",
                label=f"{titles[method]} ({row['context_tokens']:.0f} tokens)" if group == list(report)[-1] else None,
            )
    axes.set_xlabel("latency of one answer, ms")
    axes.set_ylabel("accuracy, %")
    axes.set_xlim(left=0)
    axes.set_ylim(-3, 105)
    axes.grid(alpha=0.3)
    axes.set_title("unseen tasks: filled; seen tasks: hollow", fontsize=10)
    axes.legend(fontsize=8, loc="center left")


def draw_gates(figure: Any, gates: dict[str, np.ndarray]) -> None:
    """The gates of some tasks, layers by experts."""
    rows = -(-len(gates) // 2)
    axes = figure.subplots(rows, 2, squeeze=False, sharex=True, sharey=True)
    image: Any = None
    for place, (name, gates_LE) in zip(axes.flat, gates.items(), strict=False):
        image = place.imshow(gates_LE, aspect="auto", vmin=0, vmax=1, cmap="magma")
        place.set_title(name, fontsize=8)
    for place in axes[:, 0]:
        place.set_ylabel("layer")
    for place in axes[-1]:
        place.set_xlabel("expert")
    figure.colorbar(image, ax=axes, label="gate")
    figure.suptitle("what the prompt became", fontsize=10)
