"""Tasks by name. In: names, directories and the user's files, as the configuration gives them. Out: name → `Task`.

A name means one task, or one of the groups of the embedded suite ("pocket", "pocket_unseen", …).
"""

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path

from lora_gen_jax.data.pocket import suite
from lora_gen_jax.data.reasoning import REASONING_TASKS, folder_of, load_reasoning
from lora_gen_jax.data.records import load_records
from lora_gen_jax.data.tasks import Task
from lora_gen_jax.errors import DataError


def load_tasks(
    names: Iterable[str],
    directory: str | Path | None = None,
    tfds_dir: str | Path | None = None,
    files: Sequence[str | Path] = (),
) -> dict[str, Task]:
    """The named tasks, in that order, and then every task in `files`.

    Reasoning tasks come from `directory` where it is given (original files, one folder a task), else from
    tensorflow-datasets prepared in `tfds_dir`, or in TFDS's default directory. With both given, the directory serves
    the tasks it has a folder for. Embedded tasks need neither. `names` may also name tasks in `files`.
    Raises DataError: an unknown name (with the nearest known one), a missing directory (naming --data.dir), two tasks
    of one name, and whatever the loaders raise.
    """
    own = _own_tasks(files)
    wanted = list(dict.fromkeys(names))
    embedded = {name: suite.find(name) for name in wanted if name not in own and name not in REASONING_TASKS}
    for name, tasks in embedded.items():
        if not tasks:
            raise DataError(_unknown(name, (*REASONING_TASKS, *suite.GROUPS, *own)), field="data.tasks", code="unknown")
    reasoning = [name for name in wanted if name in REASONING_TASKS]
    from_files = reasoning
    if directory is None:
        from_files = []
    elif not Path(directory).is_dir():
        problem = f"the data directory {directory} does not exist"
        remedy = "set --data.dir to the directory of the tasks"
        raise DataError(problem, field="data.dir", code="missing", remedy=remedy)
    elif tfds_dir is not None:
        from_files = [name for name in reasoning if folder_of(directory, name)]
    loaded = load_reasoning(directory, from_files) if directory is not None else {}
    others = [name for name in reasoning if name not in from_files]
    if others:
        # Imported only where used: a user with files of their own needs no tensorflow-datasets.
        from lora_gen_jax.data.tfds_source import load_tfds

        loaded |= load_tfds(tfds_dir, others)
    found: dict[str, Task] = {}
    for name in wanted:
        tasks = [loaded[name]] if name in loaded else embedded.get(name, [])
        found |= {task.name: task for task in tasks}
    return found | own


def _own_tasks(files: Sequence[str | Path]) -> dict[str, Task]:
    own: dict[str, Task] = {}
    for path in files:
        for task in load_records(path):
            if task.name in own or task.name in REASONING_TASKS or suite.find(task.name):
                problem = f"{path}: another task is already called {task.name!r}"
                raise DataError(problem, field="data.files", code="taken", remedy='rename the file or its "task"')
            own[task.name] = task
    return own


def _unknown(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    shown = ", ".join(known[:12]) + (", …" if len(known) > 12 else "")
    return f"unknown task {name!r}; {hint}Known tasks: {shown}"
