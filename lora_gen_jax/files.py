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
from lora_gen_jax.full_disk import disk_reason


def check_output(path: Path) -> None:
    """An output directory must not exist, or be an empty one that can be replaced by the complete one.

    Raises:
        OutputError: when it holds something or is a file, a link, a mount point or the current directory.
    """
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"output cannot be written: {reason}", field="--out", code="unwritable") from error
    if path.is_symlink() or (path.is_dir() and (path.is_mount() or path.samefile(Path.cwd()))):
        raise OutputError(
            f"output {path} cannot be replaced",
            field="--out",
            code="not replaceable",
            remedy="name a new directory, below it for example",
        )
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise OutputError(
            f"output {path} already exists",
            field="--out",
            code="exists",
            remedy="choose another --out, or remove it first",
        )


def is_directory(path: Path) -> bool:
    """Whether there is such a directory; False as well for what can be no path, too long for example."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


@contextmanager
def complete_directory(path: Path) -> Iterator[Path]:
    """A temporary directory beside `path` that takes its name when the block ends without an error.

    Raises:
        OutputError: when `path` holds something, or cannot be written.
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
def writing(path: Path, flag: str = "--out") -> Iterator[None]:
    """What goes wrong with files in this block is the output's, which the flag names.

    Raises:
        OutputError: for a full disk, missing rights and the like.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        reason = disk_reason(error) or getattr(error, "strerror", None) or error
        raise OutputError(f"output {path} cannot be written: {reason}", field=flag, code="unwritable") from error


def sync(path: Path) -> None:
    """Waits until what the system has of a file, or of a directory's names, is on the disk.

    Raises:
        OSError: when it cannot be put there, and only now the system says so.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems of networks do not know it of directories.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str, flag: str = "--out") -> None:
    """Replaces the file at once, so that no half of it is ever read.

    Raises:
        OutputError: when it cannot be written; the flag is what would name another place.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except (OSError, UnicodeEncodeError) as error:
        with suppress(OSError):  # what failed first is what is told
            temporary.unlink(missing_ok=True)
        reason = error.strerror if isinstance(error, OSError) else "its text holds half of a surrogate pair"
        raise OutputError(
            f"{path} cannot be written: {reason}", field=flag, code="unwritable", remedy=f"choose another {flag}"
        ) from error


def write_json(path: Path, values: Any, flag: str = "--out") -> None:
    """Replaces the file at once, so that no half of it is ever read.

    Raises:
        OutputError: when it cannot be written; the flag is what would name another place.
    """
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n", flag)


def text_argument(value: str, flag: str) -> str:
    """A flag's text: itself, or the content of the file that ``@FILE`` names.

    Raises:
        DataError: when the file cannot be read as UTF-8, or the text is empty.
    """
    text = value
    if value.startswith("@"):
        try:
            text = Path(value[1:]).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise DataError(
                f"{flag} names the file {value[1:]}, which cannot be read: {reason}",
                field=flag,
                code="unreadable",
            ) from error
    if not text.strip():
        raise DataError(f"{flag} is empty", field=flag, code="empty", remedy="give a text, or @FILE")
    return text
