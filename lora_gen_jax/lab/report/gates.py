"""What prompts became: gates by layer and expert, and how much experts are used.

In: gates [L, E] by task. Out: PNGs, and one small image a task for pages that show all of them.
"""

import functools
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_gen_jax.errors import DataError
from lora_gen_jax.lab.report.found import File
from lora_gen_jax.lab.report.style import evenly, grid, new_figure, save, shortened

# Heat maps in one PNG.
MOST_MAPS = 24
# Gates below this are drawn white: the expert is not used.
UNUSED = 1e-4
Gates = Mapping[str, np.ndarray]


def gates_of(file: File) -> dict[str, np.ndarray]:
    """The gates [L, E] of every task in a gates.json."""
    tasks = file.values.get("tasks")
    if not isinstance(tasks, dict) or not tasks:
        remedy = "write it again with eval.py, or remove it"
        raise DataError(f'{file.path} has no "tasks"', field=f"{file.path.name}:tasks", remedy=remedy)
    gates: dict[str, np.ndarray] = {}
    for name, rows in tasks.items():
        try:
            gates_LE = np.asarray(rows, np.float64)
        except (TypeError, ValueError):
            gates_LE = np.zeros(0)
        first = next(iter(gates.values()), gates_LE)
        inside = np.all((gates_LE >= 0) & (gates_LE <= 1 + 1e-4))
        if gates_LE.ndim != 2 or gates_LE.shape != first.shape or not gates_LE.size or not inside:
            raise DataError(
                f"{file.path}, task {name}: its gates are not a table of layers by experts with numbers from 0 to 1,"
                " the same for all tasks",
                field=f"{file.path.name}:tasks.{name}",
                remedy="write it again with eval.py, or remove it",
            )
        gates[name] = gates_LE
    return gates


def grouped(names: Sequence[str]) -> dict[str, list[str]]:
    """Tasks by whether training may have used them; those of which this is not known by the start of their names."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_group(name), []).append(name)
    first = ("seen tasks", "unseen tasks")
    return {group: groups[group] for group in (*first, *groups) if group in groups}


@functools.cache
def _group(name: str) -> str:
    from lora_gen_jax.data.pocket import suite
    from lora_gen_jax.data.reasoning import REASONING_TASKS

    if name in REASONING_TASKS:
        return "seen tasks" if REASONING_TASKS[name].seen else "unseen tasks"
    if name.startswith(("agent/seen-", "agent/unseen-")):
        return f"{name.removeprefix('agent/').partition('-')[0]} tasks"
    if name.startswith(f"{suite.SOURCE}/") and (found := suite.find(name)):
        return "seen tasks" if found[0].seen else "unseen tasks"
    return f"{name.split('/')[0]} tasks" if "/" in name else "tasks"


def share_of(gates: Sequence[np.ndarray]) -> np.ndarray:
    """Each expert's share [E] of all gates; sums to 1."""
    total_E = np.sum(np.concatenate(list(gates)), axis=0)
    return total_E / max(total_E.sum(), 1e-12)


def effective(share_E: np.ndarray) -> float:
    """exp(entropy): how many experts an even use of as much variety would take; between 1 and E."""
    used = share_E[share_E > 0]
    return math.exp(-float(np.sum(used * np.log(used))))


def top_of(gates: Gates) -> float:
    """End of the colour scale: the largest gate, rounded up to a tenth."""
    return math.ceil(max(float(g.max()) for g in gates.values()) * 10 - 1e-6) / 10 or 0.1


def colors() -> Any:
    """The colour map: white where an expert is not used, then from pale to dark."""
    from matplotlib import colormaps

    return colormaps["magma_r"].with_extremes(under="white")


def draw_gates(gates: Gates, path: Path) -> Path:
    """Heat maps, layers by experts; of more than `MOST_MAPS` tasks some, spread over all groups."""
    shown = evenly([name for names in grouped(list(gates)).values() for name in names], MOST_MAPS)
    first = gates[shown[0]]
    columns = 6 if len(shown) > 9 else 3 if len(shown) > 4 else 2
    rows, columns = grid(len(shown), columns)
    height = min(max(0.16 * first.shape[0], 0.9), 2.6)
    # A single map still needs room for its colour bar.
    figure: Any = new_figure(max(2.1 * columns + 0.9, 4.5), (height + 0.42) * rows + 0.7)
    draw_maps(figure, {name: gates[name] for name in shown}, rows, columns)
    return save(figure, path)


def draw_maps(figure: Any, gates: Gates, rows: int, columns: int) -> None:
    """Heat maps of these tasks into a figure or a part of one, with a common scale."""
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    image: Any = None
    for place, (name, gates_LE) in zip(axes.flat, gates.items(), strict=False):
        image = place.imshow(
            gates_LE, aspect="auto", vmin=UNUSED, vmax=top_of(gates), cmap=colors(), interpolation="none"
        )
        label = name.removeprefix("pocket/")
        place.set_title(shortened(label, 30), fontsize=7 if columns > 3 else 8)
        place.tick_params(labelsize=7)
        place.xaxis.get_major_locator().set_params(integer=True)
        place.yaxis.get_major_locator().set_params(integer=True)
    for place in axes.flat[len(gates) :]:
        place.set_axis_off()
    figure.supxlabel("expert", fontsize=9)
    figure.supylabel("layer", fontsize=9)
    figure.colorbar(image, ax=axes, label="gate", shrink=min(1, 2 / rows + 0.3), aspect=30)


def draw_usage(gates: Gates, path: Path) -> Path:
    """Each expert's share of all gates, overall and by group of tasks, beside an even share."""
    groups = {"all tasks": list(gates)}
    own = grouped(list(gates))
    if len(own) > 1:
        groups |= own
    E = next(iter(gates.values())).shape[1]
    figure: Any = new_figure(max(6.0, 0.3 * E + 2), 1.9 * len(groups) + 0.5)
    places = figure.subplots(len(groups), 1, squeeze=False, sharex=True, sharey=True)[:, 0]
    for axes, (group, names) in zip(places, groups.items(), strict=True):
        share_E = share_of([gates[name] for name in names])
        axes.bar(range(E), 100 * share_E, color="#4477aa", width=0.8)
        axes.axhline(100 / E, color="#cc3311", linestyle="--", linewidth=1.2, label=f"even share, {100 / E:.1f} %")
        axes.set_title(f"{group} ({len(names)}): effectively {effective(share_E):.1f} of {E} experts", fontsize=9)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    places[-1].set_xticks(range(0, E, 1 if E <= 16 else E // 16))
    places[-1].set_xlim(-0.6, E - 0.4)
    places[-1].set_xlabel("expert")
    figure.supylabel("share of all gates, %", fontsize=9)
    figure.legend(*places[0].get_legend_handles_labels(), loc="outside lower center", fontsize=9)
    return save(figure, path)


def tile(gates_LE: np.ndarray, top: float) -> bytes:
    """A PNG with one pixel a gate, rows layers and columns experts; the page scales it up."""
    from matplotlib import image

    out = io.BytesIO()
    image.imsave(out, gates_LE, vmin=UNUSED, vmax=top, cmap=colors(), format="png")
    return out.getvalue()
