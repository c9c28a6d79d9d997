"""One run at a time in a work directory, and in a bucket.

In: where a run writes. Out: an error where another one does. A directory has a lock, which ends with its process.
Buckets know no locks that end, so there the run that began last may write, and one before it ends when it notices.
"""

import importlib
import json
import logging
import os
import socket
import sys
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import jax

from lora_gen_jax.config import Config
from lora_gen_jax.errors import OutputError
from lora_gen_jax.training.bucket import location, remote_errors, writing

log = logging.getLogger(__name__)
# Not on Windows.
fcntl: ModuleType | None = importlib.import_module("fcntl") if sys.platform != "win32" else None


class Claim:
    """A note in a bucket, ``writer.json``, of the run that writes there; without a bucket nothing.

    A machine that was taken for lost, and is not, would otherwise go on beside the run that took its place. Process 0
    alone writes and looks.

    Raises:
        OutputError: when it cannot be written.
    """

    def __init__(self, config: Config):
        self.path: Any = None
        if config.bucket is None or jax.process_index() > 0:
            return
        began = datetime.now(UTC).isoformat(timespec="seconds")
        run = {"host": socket.gethostname(), "process": os.getpid(), "began": began, "id": uuid.uuid4().hex}
        self.path, self.text = location(config.saved) / "writer.json", json.dumps(run) + "\n"
        with writing(self.path):
            self.path.write_text(self.text)

    def check(self) -> None:
        """Raises OutputError where another run has begun there since, or that cannot be known."""
        if self.path is None:
            return
        try:
            found = self.path.read_text()
            if found == self.text:
                return
            other = json.loads(found)
            who = f"on {other['host']}, process {other['process']}, since {other['began']}"
        except (OSError, ValueError, KeyError, TypeError, *remote_errors(self.path)) as error:
            raise OutputError(
                f"{self.path}, which says what run writes there, cannot be read ({type(error).__name__}: {error})",
                field="--bucket",
                code="unreadable",
                remedy="start this command again",
            ) from error
        raise OutputError(
            f"another training ({who}) writes to {self.path.parent} now, and this one ends: the other goes on from"
            " the newest checkpoint",
            field="--bucket",
            code="taken",
            remedy="For two runs, name another --bucket",
        )


@contextmanager
def sole_run(directory: Path) -> Iterator[None]:
    """A block in which no other training may write to a work directory; process 0 holds a lock on a file in it.

    The lock ends with its process, however that ends. File systems that know no locks are taken as they are.

    Raises:
        OutputError: when another run holds it.
    """
    with ExitStack() as stack:
        if jax.process_index() == 0 and fcntl is not None:
            file = stack.enter_context((directory / ".lock").open("a"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise OutputError(
                    f"another training is writing to {directory}",
                    field="--workdir",
                    code="taken",
                    remedy="wait until it ends, or name another --workdir",
                ) from error
            except OSError as error:
                log.warning("%s cannot be locked (%s): start no second run there", directory, error.strerror)
        yield
