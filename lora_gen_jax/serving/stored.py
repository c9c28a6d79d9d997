"""Specializations on disk: those that a server is given, and those that it keeps itself.

In: directories. Out: `Entry`s to serve, or an error that names the directory.
"""

import contextlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lora_gen_jax.adapters.specialization import READABLE, TENSORS, load_specialization
from lora_gen_jax.errors import CheckpointError, ConfigError, LoraGenError, OutputError
from lora_gen_jax.files import sync
from lora_gen_jax.serving.errors import ApiError
from lora_gen_jax.serving.registry import Entry, Served, check_new_name

log = logging.getLogger(__name__)
_REMOVED, _DAMAGED = ".removed-", ".damaged-"


def read_entries(paths: Iterable[Path], served: Served) -> list[Entry]:
    """The specializations in directories, or in directories of them; each by the name of its own directory."""
    return _entries([found for path in paths for found in _directories(path)], served)


def read_store(store: Path, served: Served) -> list[Entry]:
    """The specializations that servers have kept in a directory, which is made where there is none.

    What no server can have put there (plain files, a file system's lost+found) is passed over; what one was removing
    when it ended is removed; what is damaged is set aside under a hidden name, so that the others are served.
    """
    try:
        store.mkdir(parents=True, exist_ok=True)
        children = sorted(store.iterdir())
    except OSError as error:
        problem = f"--store {store} cannot be used: {error.strerror}"
        raise OutputError(problem, field="--store", code="unusable", remedy="choose another") from error
    if (store / TENSORS).is_file():
        problem, remedy = f"--store {store} is a specialization", "name the directory around it, or --specializations"
        raise ConfigError(problem, field="--store", code="specialization", remedy=remedy)
    for child in children:
        if child.name.startswith(".") and _REMOVED in child.name:
            shutil.rmtree(child, ignore_errors=True)
    named = [child for child in children if _can_be_named(child.name) and child.is_dir()]
    return _entries([child for child in named if not _set_aside(child, served)], served)


def _set_aside(directory: Path, served: Served) -> bool:
    """Whether a stored specialization is damaged; it is given a hidden name then, and the log says so."""
    try:
        specialization = load_specialization(directory)
        noted = _noted(directory)
        for part, ours in (("pool", served.fit.pool), ("edge", served.edge)):
            if specialization.fingerprints[part] != ours and noted.get(part) != ours:
                return False  # of another generator, as both of its files say: another store was meant
            if specialization.fingerprints[part] != ours:
                raise CheckpointError(f"its files differ in the fingerprint of the {part}", field=f"{TENSORS}:{part}")
        served.fit.check(specialization)
    except LoraGenError as error:
        hidden = directory.with_name(f".{directory.name}{_DAMAGED}{time.time_ns()}")
        kept = f"it is kept as {hidden.name}"
        try:
            directory.rename(hidden)
        except OSError as failed:
            kept = f"it is left there ({failed.strerror})"
        log.warning("%s is not served: %s; %s", directory, error.problem, kept)
        return True
    return False


def _noted(directory: Path) -> dict[str, Any]:
    """The fingerprints as the readable file has them."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        return dict(json.loads((directory / READABLE).read_text(encoding="utf-8"))["fingerprints"])
    return {}


def remove_directory(directory: Path) -> None:
    """Removes a stored specialization, or a link to one; no half of it is ever read again."""
    hidden = directory.with_name(f".{directory.name}{_REMOVED}{time.monotonic_ns()}")
    try:
        if directory.is_symlink():
            directory.unlink()
        else:
            directory.rename(hidden)
            sync(directory.parent)  # it is not back after a loss of power
            shutil.rmtree(hidden)
    except FileNotFoundError:
        return
    except OSError as error:
        problem = f"{directory} cannot be removed: {error.strerror}"
        raise OutputError(problem, field="--store", code="unwritable") from error


def _entries(directories: Iterable[Path], served: Served) -> list[Entry]:
    entries: dict[str, tuple[Path, Entry]] = {}
    for directory in directories:
        # Of "." and "..", too; but a link keeps the name that it was given.
        name = os.path.basename(os.path.abspath(directory))
        try:
            check_new_name(name)
            entry = served.entry(name, load_specialization(directory))
        except LoraGenError as error:
            problem = f"specialization {directory} cannot be served: {error.problem}"
            raise CheckpointError(problem, field=error.field, code=error.code, remedy=error.remedy) from error
        if name.lower() in entries:
            other = entries[name.lower()][0]
            problem = f"{directory} and {other} would have the same name"
            raise CheckpointError(problem, field="name", code="taken", remedy="rename one of them")
        entries[name.lower()] = directory, entry
    return [entry for _, entry in entries.values()]


def _directories(path: Path) -> list[Path]:
    if (path / TENSORS).is_file():
        return [path]
    if not path.is_dir():
        remedy = "give specializations that `lora-gen specialize` wrote"
        raise CheckpointError(
            f"{path} is not a directory", field="--specializations", code="no directory", remedy=remedy
        )
    # Those with a dot are being written, or were when a server was killed.
    found = sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))
    if not found:
        remedy = "give directories that `lora-gen specialize` wrote"
        raise CheckpointError(f"{path} holds no specialization", field="--specializations", code="empty", remedy=remedy)
    return found


def _can_be_named(name: str) -> bool:
    try:
        check_new_name(name)
    except ApiError:
        return False
    return True
