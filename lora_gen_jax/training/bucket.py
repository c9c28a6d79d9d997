"""Where checkpoints lie, a directory or a bucket of Google Cloud Storage, and that one run at a time writes there.

In: a path as configs and flags give it, ``gs://NAME/DIR`` for a bucket. Out: a path object that reads and writes there.
Orbax writes arrays to buckets by itself; lists and small files go through gcsfs and Google's own client. A directory
has a lock file, whose lock ends with the process that holds it. A bucket has no such locks: there the run that began
last owns it, and an earlier run stops when it notices.
"""

import importlib.util
import json
import logging
import os
import re
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import filelock
import jax
from etils import epath

from lora_gen_jax.config import Config
from lora_gen_jax.errors import ConfigError, OutputError

log = logging.getLogger(__name__)

_ADDRESS = re.compile(r"gs:/+(?P<place>[^/].*)")


def is_bucket(path: str | Path) -> bool:
    """Whether it is an address in a bucket. A `Path`, which makes one slash of two, will do."""
    return _ADDRESS.fullmatch(str(path)) is not None


def location(path: str | Path) -> Any:
    """A `pathlib.Path`, or for an address in a bucket what behaves as one; ConfigError where gcsfs is missing."""
    found = _ADDRESS.fullmatch(str(path))
    if found is None:
        return Path(path)
    if importlib.util.find_spec("gcsfs") is None:
        problem = "gs:// addresses need gcsfs, which is not installed"
        raise ConfigError(problem, field="gcsfs", remedy="pip install gcsfs (or this package with its extra [gcs])")
    import fsspec.config

    # What was listed before another process, or Orbax beside gcsfs, wrote there is out of date.
    fsspec.config.conf.setdefault("gs", {})["use_listings_cache"] = False
    return epath.Path(f"gs://{found['place'].rstrip('/')}")


def absolute(place: Any) -> Any:
    """A `location` that does not depend on the current directory."""
    return place if is_bucket(place) else place.absolute()


@contextmanager
def writing(path: Any) -> Iterator[None]:
    """A block that writes a small file at a `location` in a bucket; OutputError when it cannot."""
    try:
        yield
    except (OSError, *remote_errors(path)) as error:
        problem = f"{path} cannot be written ({type(error).__name__}: {error})"
        remedy = "Is there such a bucket, and may this machine write to it (--bucket)?"
        raise OutputError(problem, field="--bucket", code="unwritable", remedy=remedy) from error


def remote_errors(path: Any) -> tuple[type[Exception], ...]:
    """What reading or writing at a `location` raises, beside OSError and ValueError, where it is in a bucket."""
    if not is_bucket(path):
        return ()
    from aiohttp import ClientError
    from gcsfs.retry import HttpError
    from google.api_core.exceptions import GoogleAPIError
    from google.auth.exceptions import GoogleAuthError

    return (HttpError, ClientError, GoogleAPIError, GoogleAuthError)


class BucketOwner:
    """A note in the bucket, ``writer.json``, that names the run that owns it; does nothing without a bucket.

    Without the note, a machine that was given up as lost but still runs would write beside the run that replaced it.
    Only process 0 writes and reads it.
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
            problem = f"{self.path}, which says what run writes there, cannot be read ({type(error).__name__}: {error})"
            remedy = "start this command again"
            raise OutputError(problem, field="--bucket", code="unreadable", remedy=remedy) from error
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

    OutputError if another run holds it; on a file system without locks, the run goes on with a warning.
    """
    lock = filelock.FileLock(directory / ".lock", timeout=0)
    if jax.process_index() == 0:
        try:
            lock.acquire()
        except filelock.Timeout as error:
            problem = f"another training is writing to {directory}"
            remedy = "wait until it ends, or name another --workdir"
            raise OutputError(problem, field="--workdir", code="taken", remedy=remedy) from error
        except (OSError, NotImplementedError) as error:
            log.warning("%s cannot be locked (%s): start no second run there", directory, error)
    try:
        yield
    finally:
        lock.release()
