"""What a report holds. In: `Found` and a directory for PNGs. Out: the page's sections as data; the PNGs beside it.

`page.html` says how each kind of part looks. The page needs nothing but itself: images are data URIs, there is no
script. Figures have a white background, which they were drawn for, in both color schemes.
"""

import base64
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_gen_jax.errors import DataError
from lora_gen_jax.evaluation import published
from lora_gen_jax.evaluation.sheet import Sheet, to_html
from lora_gen_jax.lab.agent.table import agent_sheets
from lora_gen_jax.lab.report import accuracy, curves, gates, tables
from lora_gen_jax.lab.report.found import SOURCES, File, Found, gather, machine_text
from lora_gen_jax.lab.report.style import title_of

# A table of more tasks is folded.
MOST_ROWS = 12
Part = dict[str, Any]
"""What the template needs for one part: its "kind", and values by name."""
Parts = list[Part]


class Section(NamedTuple):
    """A part of the page: its name in the page's address, its heading, and what it shows."""

    anchor: str
    title: str
    make: Callable[[Found, Path, Sequence[str]], Parts]
    parts: Sequence[Part] = ()


def page(found: Found, out: Path, tasks: Sequence[str], directories: Sequence[Path]) -> str:
    """The page as HTML; draws its figures.

    Args:
        found: what the directories hold.
        out: where PNGs go.
        tasks: that are drawn one by one; all where they are few when empty.
        directories: named at the top.
    """
    import jinja2

    made = [section._replace(parts=section.make(found, out, tasks)) for section in SECTIONS]
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
    environment.filters |= {"table": to_html, "base64": lambda png: base64.b64encode(png).decode()}
    filled = [section for section in made if section.parts]
    return environment.get_template("page.html").render(sections=filled, directories=directories)


def sheet(content: Sheet) -> Part:
    return {"kind": "sheet", "sheet": content}


def note(text: str) -> Part:
    return {"kind": "note", "text": text}


def fold(text: str, parts: Parts) -> Part:
    """Parts that open on a click."""
    return {"kind": "fold", "text": text, "parts": parts}


def picture(path: Path, text: str, source: str) -> Part:
    """A figure: what it shows, and which file and command it comes from."""
    return {"kind": "picture", "png": path.read_bytes(), "name": path.name, "text": text, "source": source}


def source_of(files: Sequence[File]) -> str:
    """Where a figure comes from: files, and the command that writes them."""
    names = ", ".join(f"{file.label}/{file.path.name}" for file in files)
    return f"{names} (written by {SOURCES[files[0].path.name][1]})"


def numbered(out: Path, name: str, number: int) -> Path:
    """name.png, name_2.png, …"""
    return out / (f"{name}.png" if number == 0 else f"{name}_{number + 1}.png")


def comparison(found: Found, out: Path, tasks: Sequence[str]) -> Parts:
    """report.json as tables."""
    parts = []
    for file in found.files["report.json"]:
        try:
            parts.append(sheet(tables.comparison_sheet(file.values)))
        except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
            problem = f"{file.path} has not the layout of report.json ({error!r})"
            raise DataError(problem, field=file.path.name, code="layout", remedy="remove it") from error
        parts.append(note(f"From {source_of([file])}."))
    return parts


def accuracies(found: Found, out: Path, tasks: Sequence[str]) -> Parts:
    """results.json: accuracy against latency, and tables."""
    parts = []
    for number, scores in enumerate(gather(found.files["results.json"])):
        source = source_of(scores.files)
        if path := accuracy.draw_means(scores, numbered(out, "accuracy_latency", number)):
            what = (
                f"Mean accuracy over {len(scores.tasks)} tasks against the latency of one answer with its whole"
                " context; better is up and to the left. One line a method, labeled with the number of shots in its"
                " prompt (0: only a description, or for methods without a prompt nothing). Error bars: standard error"
                f" of the mean. Latency: mean over tasks, measured on {scores.machines}."
            )
            parts.append(picture(path, what, source))
        parts.append(sheet(tables.score_sheet(scores)))
        chosen = [name for name in tasks if name in scores.tasks]
        if not tasks and 1 < len(scores.tasks) <= accuracy.MOST_TASKS:
            chosen = scores.tasks
        where = numbered(out, "accuracy_latency_by_task", number)
        if chosen and (path := accuracy.draw_tasks(scores, chosen, where)) is not None:
            what = "The same for single tasks; error bars are the standard error over a task's documents."
            parts.append(picture(path, what, source))
        content = sheet(tables.task_sheet(scores))
        many = len(scores.tasks) > MOST_ROWS
        parts.append(fold(f"All {len(scores.tasks)} tasks", [content]) if many else content)
    return parts


def gate_maps(found: Found, out: Path, tasks: Sequence[str]) -> Parts:
    """gates.json: heat maps of some tasks, then of all, and expert usage."""
    parts = []
    for number, file in enumerate(found.files["gates.json"]):
        own, source = gates.gates_of(file), source_of([file])
        shown = min(len(own), gates.MOST_MAPS)
        what = f"Gates by layer and expert, {shown} of {len(own)} tasks; white: the expert is not used."
        parts.append(picture(gates.draw_gates(own, numbered(out, "gates", number)), what, source))
        each = statistics.fmean(gates.effective(gates.share_of([g])) for g in own.values())
        what = (
            "Each expert's share of all gates, over all layers; the dashed line is an even share. The effective number"
            f" of experts is exp(entropy of the shares); of a single task's gates it is {each:.1f} on average."
            f" Generators with a pool for every layer share the number of an expert, not the expert."
        )
        parts.append(picture(gates.draw_usage(own, numbered(out, "expert_usage", number)), what, source))
        parts.append(fold(f"Gates of all {len(own)} tasks", all_gates(own)))
    return parts


def all_gates(own: gates.Gates) -> Parts:
    """One small heat map a task, by groups."""
    top, layers = gates.top_of(own), next(iter(own.values())).shape[0]
    scale = gates.tile(np.linspace(0, top, 64)[None], top)
    parts = [{"kind": "scale", "png": scale, "text": f"{top:.1f}"}]
    parts.append(note("Rows are layers, the first above; columns are experts. n: effective number of experts."))
    from markupsafe import Markup

    style = Markup(f'style="height:{int(min(max(12 * layers, 48), 180))}px"')
    for group, names in gates.grouped(list(own)).items():
        captions = [f"{name} (n = {gates.effective(gates.share_of([own[name]])):.1f})" for name in names]
        tiles = [(gates.tile(own[name], top), caption) for name, caption in zip(names, captions, strict=True)]
        parts.append({"kind": "tiles", "text": group, "tiles": tiles, "style": style})
    return parts


def training(found: Found, out: Path, tasks: Sequence[str]) -> Parts:
    """metrics.jsonl: curves of all runs."""
    path = curves.draw_training(found.runs, out / "training.png") if found.runs else None
    if path is None:
        return []
    files = ", ".join(f"{run.label}/{run.path.name}" for run in found.runs)
    what = (
        "Training curves by step; long ones are pale with their running mean on top. The validation loss leaves out"
        " the end token. CV² and entropy are of a batch's gates: 0 and log(experts) mean even use."
    )
    return [picture(path, what, f"{files} (written by {SOURCES['metrics.jsonl'][1]})")]


def efficiency(found: Found, out: Path, tasks: Sequence[str]) -> Parts:
    """efficiency.json: the break-even curve, and times."""
    parts = []
    for number, file in enumerate(found.files["efficiency.json"]):
        if (curve := curves.break_even_of(file)) is not None:
            path = curves.draw_break_even(*curve, numbered(out, "break_even", number))
            meets = [(title_of(m), math.ceil(x - 1e-9)) for m, (x, _) in curves.crossings(*curve).items()]
            said = "; ".join(f"faster than {title} from query {first} on" for title, first in meets)
            what = "Time in all, with what is done once for a task, against the number of queries answered."
            what += f" LoRA-Gen is {said}." if said else ""
            parts.append(picture(path, what, f"{source_of([file])}, {machine_text(file.values)}"))
        else:
            parts.append(note(f"{file.path.name} of {file.label} has no curve over queries."))
        if (content := tables.efficiency_sheet(file.values)) is not None:
            parts.append(sheet(content))
    return parts


def agents(found: Found, out: Path, tasks: Sequence[str]) -> Parts:
    """agent.json as tables."""
    parts = []
    for file in found.files["agent.json"]:
        methods = file.values.get("methods")
        parts += [sheet(content) for content in agent_sheets(methods if isinstance(methods, dict) else {})]
        parts.append(note(f"From {source_of([file])}; latencies on {machine_text(file.values)}."))
    return parts


def published_figures(found: Found, out: Path, tasks: Sequence[str]) -> Parts:
    """The paper's figures, apart from ours."""
    remark = (
        f"From {published.PAPER}: published, {published.MACHINE}, other models and data. Nothing here was measured by"
        " this program; compare within a table, not with the tables above."
    )
    return [note(remark), *(sheet(make()) for make in tables.PUBLISHED)]


def missing(found: Found, out: Path, tasks: Sequence[str]) -> Parts:
    """What was not found, and which command makes it."""
    files = [(name, SOURCES[name]) for name in found.missing]
    return [{"kind": "missing", "files": files}] if files else []


def settings(found: Found, out: Path, tasks: Sequence[str]) -> Parts:
    """Configs, versions and machines, folded."""
    parts = []
    for file in found.files["results.json"]:
        names = ("machine", "versions", "checkpoints", "config")
        text = json.dumps({name: file.values[name] for name in names if name in file.values}, indent=1)
        parts.append(fold(f"{file.label}: {machine_text(file.values)}", [{"kind": "code", "text": text}]))
    return parts


# Each reads what it needs; tasks are those that are drawn one by one.
SECTIONS = (
    Section("comparison", "Seen and unseen tasks", comparison),
    Section("accuracy", "Accuracy against latency", accuracies),
    Section("gates", "Gates and expert usage", gate_maps),
    Section("training", "Training", training),
    Section("efficiency", "Break-even and cost", efficiency),
    Section("agent", "Tool calls", agents),
    Section("published", "Published figures", published_figures),
    Section("missing", "Not here", missing),
    Section("settings", "Settings", settings),
)
