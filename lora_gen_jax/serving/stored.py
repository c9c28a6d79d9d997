"""Specialisations on disk: those that a server is given, and those that it keeps itself.

In: directories. Out: `Entry`s to serve, or an error that names the directory.
"""

import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from lora_gen_jax.adapters.specialization import TENSORS, load_specialization
from lora_gen_jax.errors import CheckpointError, ConfigError, LoraGenError, OutputError
from lora_gen_jax.serving.errors import ApiError
from lora_gen_jax.serving.registry import Entry, Served, check_new_name

_REMOVED = ".removed-"


def read_entries(paths: Iterable[Path], served: Served) -> list[Entry]:
    """The specialisations in directories, or in directories of them; each by the name of its own directory.

    Raises:
        CheckpointError: naming the directory that is none, is damaged, does not fit the generator, or has a name that
            is taken or cannot be one.
    """
    return _entries([found for path in paths for found in _directories(path)], served)


def read_store(store: Path, served: Served) -> list[Entry]:
    """The specialisations that servers have kept in a directory, which is made where there is none.

    What no server can have put there (plain files, a file system's lost+found) is passed over; what one was removing
    when it ended is removed.

    Raises:
        CheckpointError: naming the specialisation that is damaged or does not fit the generator.
        ConfigError: when the directory is a specialisation itself.
        OutputError: when it cannot be used.
    """
    try:
        store.mkdir(parents=True, exist_ok=True)
        children = sorted(store.iterdir())
    except OSError as error:
        raise OutputError(
            f"--store {store} cannot be used: {error.strerror}",
            field="--store",
            code="unusable",
            remedy="choose another",
        ) from error
    if (store / TENSORS).is_file():
        raise ConfigError(
            f"--store {store} is a specialization",
            field="--store",
            code="specialization",
            remedy="name the directory around it, or --specializations",
        )
    for child in children:
        if child.name.startswith(".") and _REMOVED in child.name:
            shutil.rmtree(child, ignore_errors=True)
    return _entries([child for child in children if _can_be_named(child.name) and child.is_dir()], served)


def remove_directory(directory: Path) -> None:
    """Removes a stored specialisation, or a link to one; no half of it is ever read again.

    Raises:
        OutputError: when it cannot be removed.
    """
    hidden = directory.with_name(f".{directory.name}{_REMOVED}{time.monotonic_ns()}")
    try:
        if directory.is_symlink():
            directory.unlink()
        else:
            directory.rename(hidden)
            shutil.rmtree(hidden)
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputError(
            f"{directory} cannot be removed: {error.strerror}", field="--store", code="unwritable"
        ) from error


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
            raise CheckpointError(
                f"{directory} and {other} would have the same name",
                field="name",
                code="taken",
                remedy="rename one of them",
            )
        entries[name.lower()] = directory, entry
    return [entry for _, entry in entries.values()]


def _directories(path: Path) -> list[Path]:
    if (path / TENSORS).is_file():
        return [path]
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is not a directory",
            field="--specializations",
            code="no directory",
            remedy="give specializations that `lora-gen specialize` wrote",
        )
    # Those with a dot are being written, or were when a server was killed.
    found = sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))
    if not found:
        raise CheckpointError(
            f"{path} holds no specialization",
            field="--specializations",
            code="empty",
            remedy="give directories that `lora-gen specialize` wrote",
        )
    return found


def _can_be_named(name: str) -> bool:
    try:
        check_new_name(name)
    except ApiError:
        return False
    return True
