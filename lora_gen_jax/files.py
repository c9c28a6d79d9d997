"""Output directories and files that appear complete or not at all, and texts from flags.

In: a path and a function that fills a directory. Out: the directory under its own name, once it is complete and on the
disk: a machine that loses its power right afterwards has either all of it or nothing.
"""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from lora_gen_jax.errors import DataError, OutputError


def check_output(path: Path) -> None:
    """Raises OutputError unless `path` does not exist, or is an empty directory that a complete one can replace."""
    with writing(path):
        if path.is_symlink() or (path.is_dir() and (path.is_mount() or path.samefile(Path.cwd()))):
            problem, remedy = f"output {path} cannot be replaced", "name a new directory, below it for example"
            raise OutputError(problem, field="--out", code="not replaceable", remedy=remedy)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            problem, remedy = f"output {path} already exists", "choose another --out, or remove it first"
            raise OutputError(problem, field="--out", code="exists", remedy=remedy)


def is_directory(path: Path) -> bool:
    """Whether there is such a directory; False as well for what can be no path, too long for example."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


@contextmanager
def complete_directory(path: Path) -> Iterator[Path]:
    """A temporary directory beside `path` that takes its name when the block ends without an error.

    Raises OutputError when `path` holds something, or cannot be written.
    """
    check_output(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        os.chmod(temporary, 0o755)  # mkdtemp's 0700 would outlive the rename
    try:
        yield temporary
        with writing(path):
            for folder, _, names in os.walk(temporary):
                for name in names:
                    sync(Path(folder, name))
                sync(Path(folder))
            if path.exists():
                path.rmdir()
            temporary.rename(path)
            sync(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def writing(path: Any, flag: str = "--out") -> Iterator[None]:
    """Raises OutputError for what goes wrong with files in this block: a full disk, missing rights and the like."""
    try:
        yield
    except (OSError, SafetensorError, UnicodeError) as error:  # safetensors reports a full disk as its own error
        reason = getattr(error, "strerror", None) or error
        problem, remedy = f"{path} cannot be written: {reason}", f"choose another {flag}, or mend that"
        raise OutputError(problem, field=flag, code="unwritable", remedy=remedy) from error


def sync(path: Path) -> None:
    """Waits until what the system has of a file, or of a directory's names, is on the disk; OSError if it never is."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync directories.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str, flag: str = "--out") -> None:
    """Replaces the file at once, so that no half of it is ever read.

    Raises OutputError when it cannot be written; the flag is what would name another place.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path, flag):
        try:
            temporary.write_text(text, encoding="utf-8")
            sync(temporary)
            temporary.replace(path)
            sync(path.parent)
        except BaseException:
            with suppress(OSError):  # what failed first is what is told
                temporary.unlink(missing_ok=True)
            raise


def write_json(path: Path, values: Any, flag: str = "--out") -> None:
    """As `write_text`, of values as JSON."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n", flag)


def listed(text: str | None) -> list[str]:
    """What stands between the commas of a flag's text."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def text_argument(value: str, flag: str) -> str:
    """A flag's text: itself, or the content of the file that ``@FILE`` names.

    Raises DataError when the file cannot be read as UTF-8, or the text is empty.
    """
    text = value
    if value.startswith("@"):
        try:
            text = Path(value[1:]).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            problem = f"{flag} names the file {value[1:]}, which cannot be read: {reason}"
            raise DataError(problem, field=flag, code="unreadable") from error
    if not text.strip():
        raise DataError(f"{flag} is empty", field=flag, code="empty", remedy="give a text, or @FILE")
    return text
