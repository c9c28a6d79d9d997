"""Accuracy against latency (the paper's Figure 1). In: `Scores`, or a report.json. Out: PNGs.

One line a method through its numbers of shots; the same for every task, in small figures side by side.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_gen_jax.lab.report.found import Point, Scores, mean_point, task_point
from lora_gen_jax.lab.report.style import color_of, evenly, grid, new_figure, save, shortened, title_of

# Small figures side by side.
MOST_TASKS = 8
# Labels of a method's points closer than this share of the axes are written as one.
_CLOSE = 0.04
# Where the labels of the first, second, … method stand from their points, in points of print.
_PLACES = ((8, 5), (8, -12), (-8, 5), (-8, -12))
Lines = Mapping[str, list[Point]]


def draw_means(scores: Scores, path: Path) -> Path | None:
    """AVE over tasks against the mean latency; None where no latency was measured."""
    lines = _timed({m: [mean_point(r, scores.tasks, s) for s, r in of.items()] for m, of in scores.methods.items()})
    if not lines:
        return None
    figure: Any = new_figure(8, 5.4)
    axes = figure.add_subplot()
    draw_lines(axes, lines)
    axes.set_xlabel("latency of one answer, ms")
    axes.set_ylabel(f"accuracy, % (mean over {len(scores.tasks)} task{'s' * (len(scores.tasks) > 1)})")
    figure.legend(loc="outside lower center", ncols=2, fontsize=9)
    return save(figure, path)


def draw_tasks(scores: Scores, tasks: Sequence[str], path: Path) -> Path | None:
    """The same for each of at most eight tasks."""
    tasks = evenly(tasks, MOST_TASKS)
    by_task = {
        task: _timed({m: [task_point(r, task, s) for s, r in of.items()] for m, of in scores.methods.items()})
        for task in tasks
    }
    by_task = {task: lines for task, lines in by_task.items() if lines}
    if not by_task:
        return None
    rows, columns = grid(len(by_task), 4)
    figure: Any = new_figure(max(3.3 * columns, 6.5), 2.9 * rows + 0.7)
    places = figure.subplots(rows, columns, squeeze=False)
    handles: dict[str, Any] = {}
    for axes, (task, lines) in zip(places.flat, by_task.items(), strict=False):
        draw_lines(axes, lines)
        axes.set_title(shortened(task, 34), fontsize=9)
        axes.tick_params(labelsize=8)
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    for place in range(rows * columns):
        if place >= len(by_task):
            places.flat[place].set_axis_off()
        elif place + columns >= len(by_task):
            places.flat[place].set_xlabel("latency of one answer, ms", fontsize=8)
    for axes in places[:, 0]:
        axes.set_ylabel("accuracy, %", fontsize=8)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=9)
    return save(figure, path)


def _timed(lines: Lines) -> Lines:
    """Without the points that have no latency."""
    timed = {m: [p for p in points if p.latency_ms is not None] for m, points in lines.items()}
    return {method: sorted(points, key=lambda p: p.shots) for method, points in timed.items() if points}


def draw_lines(axes: Any, lines: Lines) -> None:
    """Points with error bars, joined, and labelled with their numbers of shots."""
    for method, points in lines.items():
        axes.errorbar(
            [point.latency_ms for point in points],
            [100 * point.accuracy for point in points],
            yerr=[100 * (point.stderr or 0) for point in points],
            marker="o",
            markersize=7,
            capsize=3,
            linewidth=1.6,
            alpha=0.9,
            color=color_of(method),
            label=title_of(method),
        )
    limits(axes, [point for points in lines.values() for point in points])
    for number, (method, points) in enumerate(lines.items()):
        dx, dy = _PLACES[number % len(_PLACES)]
        for label, point in _labels(axes, points):
            axes.annotate(
                label,
                (point.latency_ms, 100 * point.accuracy),
                xytext=(dx, dy),
                textcoords="offset points",
                ha="left" if dx > 0 else "right",
                fontsize=8,
                color=color_of(method),
            )


def limits(axes: Any, points: Sequence[Point]) -> None:
    """Latency from 0; accuracy around what is there, at least ten points high, so that noise does not look large."""
    low = min(100 * (point.accuracy - (point.stderr or 0)) for point in points)
    high = max(100 * (point.accuracy + (point.stderr or 0)) for point in points)
    room = max(0.12 * (high - low), (10 - (high - low)) / 2, 2)
    edge = 0.06 * (high - low + 2 * room)
    axes.set_ylim(max(low - room, -edge), min(high + room, 100 + edge))
    axes.set_xlim(0, 1.12 * max(point.latency_ms or 0 for point in points) or 1)
    axes.grid(alpha=0.3)


def _labels(axes: Any, points: list[Point]) -> list[tuple[str, Point]]:
    """What is written at which point; points that lie on one another share a label, as "1, 3, 5"."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    groups: list[list[Point]] = []
    for point in points:
        for group in groups:
            dx = abs((point.latency_ms or 0) - (group[0].latency_ms or 0)) / (right - left)
            if max(dx, abs(100 * (point.accuracy - group[0].accuracy)) / (top - bottom)) < _CLOSE:
                group.append(point)
                break
        else:
            groups.append([point])
    return [(", ".join(str(point.shots) for point in group), group[0]) for group in groups]


def draw_comparison(axes: Any, report: Mapping[str, Mapping[str, Any]]) -> None:
    """A report.json: one point a method and group of tasks; seen tasks hollow."""
    named: set[str] = set()
    every: list[Point] = []
    for group, rows in report.items():
        for method, row in rows.items():
            point = Point(0, row["accuracy"], row["stderr"], row["latency_ms"], row["context_tokens"])
            every.append(point)
            axes.errorbar(
                point.latency_ms,
                100 * point.accuracy,
                yerr=100 * (point.stderr or 0),
                marker="o",
                markersize=10 if group == "seen" else 7,
                color=color_of(method),
                markerfacecolor="none" if group == "seen" else color_of(method),
                linestyle="none",
                label=None if method in named else f"{title_of(method, row)} ({row['context_tokens']:.0f} tokens)",
            )
            named.add(method)
    limits(axes, every)
    axes.set_xlabel("latency of one answer, ms")
    axes.set_ylabel("accuracy, %")
    groups = "unseen tasks: filled; seen tasks: hollow" if "seen" in report else "unseen tasks"
    axes.set_title(groups, fontsize=10)
