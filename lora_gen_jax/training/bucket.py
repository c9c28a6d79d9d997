"""Where checkpoints lie: in a directory, or in a bucket of Google Cloud Storage.

In: a path as configs and flags give it, ``gs://NAME/DIR`` for a bucket. Out: a path object that reads and writes there.
Orbax writes arrays to buckets by itself; lists and small files go through gcsfs and Google's own client.
"""

import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from etils import epath

from lora_gen_jax.errors import ConfigError, OutputError

_ADDRESS = re.compile(r"gs:/+(?P<place>[^/].*)")


def is_bucket(path: str | Path) -> bool:
    """Whether it is an address in a bucket. A `Path`, which makes one slash of two, will do."""
    return _ADDRESS.fullmatch(str(path)) is not None


def location(path: str | Path) -> Any:
    """A `pathlib.Path`, or for an address in a bucket what behaves as one.

    Raises:
        ConfigError: for an address, where gcsfs is not installed.
    """
    found = _ADDRESS.fullmatch(str(path))
    if found is None:
        return Path(path)
    if importlib.util.find_spec("gcsfs") is None:
        raise ConfigError(
            "gs:// addresses need gcsfs, which is not installed",
            field="gcsfs",
            remedy="pip install gcsfs (or this package with its extra [gcs])",
        )
    import fsspec.config

    # What was listed before another process, or Orbax beside gcsfs, wrote there is out of date.
    fsspec.config.conf.setdefault("gs", {})["use_listings_cache"] = False
    return epath.Path(f"gs://{found['place'].rstrip('/')}")


def absolute(place: Any) -> Any:
    """A `location` that does not depend on the current directory."""
    return place if is_bucket(place) else place.absolute()


@contextmanager
def writing(path: Any) -> Iterator[None]:
    """A block that writes a small file at a `location` in a bucket.

    Raises:
        OutputError: when it cannot be written.
    """
    try:
        yield
    except (OSError, *remote_errors(path)) as error:
        raise OutputError(
            f"{path} cannot be written ({type(error).__name__}: {error})",
            field="--bucket",
            code="unwritable",
            remedy="Is there such a bucket, and may this machine write to it (--bucket)?",
        ) from error


def remote_errors(path: Any) -> tuple[type[Exception], ...]:
    """What reading or writing at a `location` raises, beside OSError and ValueError, where it is in a bucket."""
    if not is_bucket(path):
        return ()
    from aiohttp import ClientError
    from gcsfs.retry import HttpError
    from google.api_core.exceptions import GoogleAPIError
    from google.auth.exceptions import GoogleAuthError

    return (HttpError, ClientError, GoogleAPIError, GoogleAuthError)
