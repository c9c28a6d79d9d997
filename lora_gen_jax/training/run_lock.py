"""One run at a time in a work directory, and in a bucket.

In: where a run writes. Out: an error if another run writes there. A directory has a lock file, whose lock ends with the
process that holds it. A bucket has no such locks: there the run that began last owns it, and an earlier run stops when
it notices.
"""

import json
import logging
import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import filelock
import jax

from lora_gen_jax.config import Config
from lora_gen_jax.errors import OutputError
from lora_gen_jax.training.bucket import location, remote_errors, writing

log = logging.getLogger(__name__)


class BucketOwner:
    """A note in the bucket, ``writer.json``, that names the run that owns it; does nothing without a bucket.

    Without the note, a machine that was given up as lost but still runs would write beside the run that replaced it.
    Only process 0 writes and reads it.

    Raises:
        OutputError: if the note cannot be written.
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
        """Raises OutputError if another run has taken the bucket since, or if the note cannot be read."""
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
def run_lock(directory: Path) -> Iterator[None]:
    """Keeps other training runs out of a work directory; process 0 holds the lock.

    On a file system without locks, the run goes on with a warning.

    Raises:
        OutputError: if another run holds the lock.
    """
    lock = filelock.FileLock(directory / ".lock", timeout=0)
    if jax.process_index() == 0:
        try:
            lock.acquire()
        except filelock.Timeout as error:
            raise OutputError(
                f"another training is writing to {directory}",
                field="--workdir",
                code="taken",
                remedy="wait until it ends, or name another --workdir",
            ) from error
        except (OSError, NotImplementedError) as error:
            log.warning("%s cannot be locked (%s): start no second run there", directory, error)
    try:
        yield
    finally:
        lock.release()
