"""Curves over steps and over queries. In: runs; an efficiency.json. Out: PNGs, and where the break-even lies."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_gen_jax.errors import DataError
from lora_gen_jax.lab.report.found import Curve, File, Run
from lora_gen_jax.lab.report.style import PALETTE, color_of, grid, new_figure, save, title_of
from lora_gen_jax.methods.registry import GENERATOR

PANELS = {
    "loss": "loss, nats a token",
    "validation_loss": "validation loss, nats a token",
    "cv": "CV² of the experts' importance",
    "gate_entropy": "entropy of the experts' shares, nats",
    "learning_rate": "learning rate",
    "grad_norm": "norm of the gradient",
    "tokens_per_second": "tokens a second",
}
# A curve of more steps is drawn pale, its running mean over this share of the steps on it.
_MOST_RAW, _WINDOW = 60, 1 / 40
# Ranges wider than this are drawn logarithmically.
_WIDE = 50


def draw_training(runs: Sequence[Run], path: Path) -> Path | None:
    """One panel a metric, all runs in it; None where no run has any of them."""
    panels = {name: text for name, text in PANELS.items() if any(name in run.curves for run in runs)}
    if not panels:
        return None
    rows, columns = grid(len(panels), 3)
    figure: Any = new_figure(max(3.7 * columns, 6), 2.7 * rows + 0.5)
    places = figure.subplots(rows, columns, squeeze=False)
    handles: dict[str, Any] = {}
    for axes, (name, text) in zip(places.flat, panels.items(), strict=False):
        for number, run in enumerate(runs):
            if name in run.curves:
                handles[run.label] = _draw_curve(axes, run.curves[name], PALETTE[-1 - number % len(PALETTE)])
        axes.set_title(text, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        axes.set_xlabel("step", fontsize=8)
    for axes in places.flat[len(panels) :]:
        axes.set_axis_off()
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=9)
    return save(figure, path)


def _draw_curve(axes: Any, curve: Curve, color: str) -> Any:
    steps, values = np.array(curve).T
    if len(steps) <= _MOST_RAW:
        return axes.plot(steps, values, color=color, marker=".", markersize=4, linewidth=1.2)[0]
    axes.plot(steps, values, color=color, alpha=0.22, linewidth=0.8)
    return axes.plot(steps, running_mean(values, max(2, round(len(values) * _WINDOW))), color=color, linewidth=1.6)[0]


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of the last `window` values, of fewer at the start."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def break_even_of(file: File) -> tuple[list[float], dict[str, list[float]]] | None:
    """Numbers of queries, and each method's time in all in seconds; None where the file has none.

    Read from {"curve": {"queries", "ms": {method: times}}}, or from {"break_even": {"queries", method: seconds}}.
    """
    curve, plain = file.values.get("curve"), file.values.get("break_even")
    queries: Any
    if isinstance(curve, dict) and isinstance(curve.get("ms"), dict):
        queries, times, scale = curve.get("queries"), curve["ms"], 1e-3
    elif isinstance(plain, dict):
        queries, times, scale = plain.get("queries"), {k: v for k, v in plain.items() if k != "queries"}, 1.0
    else:
        return None
    if not _numbers(queries):
        return None
    lines = {method: [scale * t for t in found] for method, found in times.items() if _numbers(found)}
    for method, found in lines.items():
        if len(found) != len(queries):
            problem = f"{file.path} has {len(queries)} numbers of queries and {len(found)} times of {method}"
            remedy = "write it again with `lora-gen efficiency`, or remove it"
            raise DataError(problem, field=f"{file.path.name}:break_even.{method}", remedy=remedy)
    return ([float(q) for q in queries], lines) if len(queries) > 1 and lines else None


def _numbers(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)


def draw_break_even(queries: list[float], lines: Mapping[str, list[float]], path: Path) -> Path:
    """Cumulative time against the number of queries, and where LoRA-Gen has made up for reading the prompt."""
    figure: Any = new_figure(7.5, 4.8)
    axes = figure.add_subplot()
    for method, times in lines.items():
        axes.plot(queries, times, marker=".", markersize=5, color=color_of(method), label=title_of(method))
    meets = crossings(queries, lines)
    for number, (method, (x, y)) in enumerate(meets.items()):
        axes.plot([x], [y], marker="o", markersize=10, markerfacecolor="none", color="black")
        axes.annotate(
            f"from query {math.ceil(x - 1e-9)} on faster than {title_of(method)}",
            (x, y),
            xytext=(0.04, 0.94 - 0.07 * number),
            textcoords="axes fraction",
            arrowprops={"arrowstyle": "-", "color": "#777777", "linewidth": 0.8},
            fontsize=8,
        )
    positive = [q for q in queries if q > 0]
    if len(positive) == len(queries) and max(positive) > _WIDE * min(positive):
        axes.set_xscale("log")
        if min(min(times) for times in lines.values()) > 0:
            axes.set_yscale("log")
    axes.set_xlabel("queries answered")
    axes.set_ylabel("time in all, s")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9)
    return save(figure, path)


def crossings(queries: Sequence[float], lines: Mapping[str, Sequence[float]]) -> dict[str, tuple[float, float]]:
    """Other method → (queries, seconds) from which on LoRA-Gen stays ahead of it; without those it is never behind
    of, or never ahead of at the end."""
    own = lines.get(GENERATOR.key)
    found: dict[str, tuple[float, float]] = {}
    if own is None:
        return found
    for method, times in lines.items():
        behind = [i for i, (a, b) in enumerate(zip(own, times, strict=True)) if a >= b]
        if method == GENERATOR.key or not behind or behind[-1] == len(queries) - 1:
            continue
        i = behind[-1]
        before, after = own[i] - times[i], own[i + 1] - times[i + 1]
        part = before / (before - after)
        x = queries[i] + part * (queries[i + 1] - queries[i])
        found[method] = (x, own[i] + part * (own[i + 1] - own[i]))
    return found
