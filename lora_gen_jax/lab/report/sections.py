"""What stands in a report. In: `Found` and where PNGs go. Out: the page's sections; the PNGs beside it."""

import json
import math
import statistics
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

import numpy as np

from lora_gen_jax.errors import DataError
from lora_gen_jax.evaluation import published
from lora_gen_jax.evaluation.sheet import to_html
from lora_gen_jax.lab.agent.table import agent_sheets
from lora_gen_jax.lab.report import accuracy, curves, gates, tables
from lora_gen_jax.lab.report.found import SOURCES, File, Found
from lora_gen_jax.lab.report.page import Section, data_uri, folded, note, picture, small_picture
from lora_gen_jax.lab.report.scores import Scores, gather, machine_text
from lora_gen_jax.lab.report.style import title_of

# A table of more tasks is folded.
MOST_ROWS = 12


def source_of(files: Sequence[File]) -> str:
    """Where a figure comes from: files, and the command that writes them."""
    names = ", ".join(f"{file.label}/{file.path.name}" for file in files)
    return f"{names} (written by {SOURCES[files[0].path.name][1]})"


def numbered(out: Path, name: str, number: int) -> Path:
    """name.png, name_2.png, …"""
    return out / (f"{name}.png" if number == 0 else f"{name}_{number + 1}.png")


def comparison_section(found: Found, out: Path, tasks: Sequence[str]) -> Section:
    """report.json as tables."""
    section = Section("comparison", "Seen and unseen tasks")
    for file in found.files["report.json"]:
        try:
            section.parts.append(to_html(tables.comparison_sheet(file.values)))
        except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
            raise DataError(
                f"{file.path} has not the layout of report.json ({error!r})",
                field=file.path.name,
                code="layout",
                remedy="remove it",
            ) from error
        section.parts.append(note(f"From {source_of([file])}."))
    return section


def accuracy_section(found: Found, out: Path, tasks: Sequence[str]) -> Section:
    """results.json: accuracy against latency, and tables."""
    section = Section("accuracy", "Accuracy against latency")
    for number, scores in enumerate(gather(found.files["results.json"])):
        source = source_of(scores.files)
        if path := accuracy.draw_means(scores, numbered(out, "accuracy_latency", number)):
            section.parts.append(picture(path, means_caption(scores), source))
        section.parts.append(to_html(tables.score_sheet(scores)))
        chosen = [name for name in tasks if name in scores.tasks]
        if not tasks and 1 < len(scores.tasks) <= accuracy.MOST_TASKS:
            chosen = scores.tasks
        if chosen:
            path = accuracy.draw_tasks(scores, chosen, numbered(out, "accuracy_latency_by_task", number))
            if path is not None:
                what = "The same for single tasks; error bars are the standard error over a task's documents."
                section.parts.append(picture(path, what, source))
        content = to_html(tables.task_sheet(scores))
        fold = len(scores.tasks) > MOST_ROWS
        section.parts.append(folded(f"All {len(scores.tasks)} tasks", content) if fold else content)
    return section


def means_caption(scores: Scores) -> str:
    """What Figure 1 shows."""
    return (
        f"Mean accuracy over {len(scores.tasks)} tasks against the latency of one answer with its whole context; better"
        " is up and to the left. One line a method, labelled with the number of shots in its prompt (0: a description"
        " alone, or for methods without a prompt nothing). Error bars: standard error of the mean. Latency: mean over"
        f" tasks, measured on {scores.machines}."
    )


def gates_section(found: Found, out: Path, tasks: Sequence[str]) -> Section:
    """gates.json: heat maps of some tasks, then of all, and expert usage."""
    section = Section("gates", "Gates and expert usage")
    for number, file in enumerate(found.files["gates.json"]):
        own, source = gates.gates_of(file), source_of([file])
        shown = min(len(own), gates.MOST_MAPS)
        what = f"Gates by layer and expert, {shown} of {len(own)} tasks; white: the expert is not used."
        section.parts.append(picture(gates.draw_gates(own, numbered(out, "gates", number)), what, source))
        each = statistics.fmean(gates.effective(gates.share_of([g])) for g in own.values())
        what = (
            "Each expert's share of all gates, over all layers; the dashed line is an even share. The effective number"
            f" of experts is exp(entropy of the shares); of a single task's gates it is {each:.1f} on average."
            f" Generators with a pool for every layer share the number of an expert, not the expert."
        )
        section.parts.append(picture(gates.draw_usage(own, numbered(out, "expert_usage", number)), what, source))
        section.parts.append(folded(f"Gates of all {len(own)} tasks", _tiles(own)))
    return section


def _tiles(own: gates.Gates) -> str:
    """One small heat map a task, by groups."""
    top = gates.top_of(own)
    scale = data_uri(gates.tile(np.linspace(0, top, 64)[None], top))
    parts = [f'<p class="note">gate 0 <img class="scale" alt="scale of the gates" src="{scale}"> {top:.1f}</p>']
    parts.append(note("Rows are layers, the first above; columns are experts. n: effective number of experts."))
    layers = next(iter(own.values())).shape[0]
    height = int(min(max(12 * layers, 48), 180))
    for group, names in gates.grouped(list(own)).items():
        parts.append(f"<h3>{escape(group)}</h3><div class='tiles'>")
        for name in names:
            caption = f"{name} (n = {gates.effective(gates.share_of([own[name]])):.1f})"
            parts.append(small_picture(gates.tile(own[name], top), caption, height))
        parts.append("</div>")
    return "".join(parts)


def training_section(found: Found, out: Path, tasks: Sequence[str]) -> Section:
    """metrics.jsonl: curves of all runs."""
    section = Section("training", "Training")
    path = curves.draw_training(found.runs, out / "training.png") if found.runs else None
    if path is not None:
        files = ", ".join(f"{run.label}/{run.path.name}" for run in found.runs)
        what = (
            "Training curves by step; long ones are pale with their running mean on top. The validation loss leaves out"
            " the end token. CV² and entropy are of a batch's gates: 0 and log(experts) mean even use."
        )
        section.parts.append(picture(path, what, f"{files} (written by {SOURCES['metrics.jsonl'][1]})"))
    return section


def efficiency_section(found: Found, out: Path, tasks: Sequence[str]) -> Section:
    """efficiency.json: the break-even curve, and times."""
    section = Section("efficiency", "Break-even and cost")
    for number, file in enumerate(found.files["efficiency.json"]):
        if (parts := curves.break_even_of(file)) is not None:
            path = curves.draw_break_even(*parts, numbered(out, "break_even", number))
            meets = curves.crossings(*parts)
            said = "; ".join(
                f"faster than {title_of(m)} from query {math.ceil(x - 1e-9)} on" for m, (x, _) in meets.items()
            )
            what = "Time in all, with what is done once for a task, against the number of queries answered."
            what += f" LoRA-Gen is {said}." if said else ""
            section.parts.append(picture(path, what, f"{source_of([file])}, {machine_text(file.values)}"))
        else:
            section.parts.append(note(f"{file.path.name} of {file.label} has no curve over queries."))
        if (content := tables.efficiency_sheet(file.values)) is not None:
            section.parts.append(to_html(content))
    return section


def agent_section(found: Found, out: Path, tasks: Sequence[str]) -> Section:
    """agent.json as tables."""
    section = Section("agent", "Tool calls")
    for file in found.files["agent.json"]:
        section.parts += [to_html(sheet) for sheet in agent_sheets(file.values.get("methods") or {})]
        section.parts.append(note(f"From {source_of([file])}; latencies on {machine_text(file.values)}."))
    return section


def published_section(found: Found, out: Path, tasks: Sequence[str]) -> Section:
    """The paper's figures, apart from ours."""
    remark = (
        f"From {published.PAPER}: published, {published.MACHINE}, other models and data. Nothing here was measured by"
        " this program; compare within a table, not with the tables above."
    )
    content = "".join(to_html(make()) for make in tables.PUBLISHED)
    return Section("published", "Published figures", [f'<div class="published">{note(remark)}{content}</div>'])


def missing_section(found: Found, out: Path, tasks: Sequence[str]) -> Section:
    """What was not found, and which command makes it."""
    lines = [f"<li>{SOURCES[name][0]}: <code>{name}</code>, by {SOURCES[name][1]}</li>" for name in found.missing]
    return Section("missing", "Not here", [f"<ul>{''.join(lines)}</ul>"] if lines else [])


def settings_section(found: Found, out: Path, tasks: Sequence[str]) -> Section:
    """Configs, versions and machines, folded."""
    section = Section("settings", "Settings")
    for file in found.files["results.json"]:
        known = {
            key: file.values[key] for key in ("machine", "versions", "checkpoints", "config") if key in file.values
        }
        text = json.dumps(known, indent=1).replace("&", "&amp;").replace("<", "&lt;")
        section.parts.append(folded(f"{file.label}: {machine_text(file.values)}", f"<pre>{text}</pre>"))
    return section


# Each reads what it needs; tasks are those that are drawn one by one.
SECTIONS: tuple[Callable[[Found, Path, Sequence[str]], Section], ...] = (
    comparison_section,
    accuracy_section,
    gates_section,
    training_section,
    efficiency_section,
    agent_section,
    published_section,
    missing_section,
    settings_section,
)
