"""The Hugging Face hub: models and generators by name, in the hub's own cache.

In: ``org/name``, or ``org/name@revision`` for a commit, tag or branch. Out: a directory with the files, downloaded
where they are not in the cache yet. Tokens, the cache's place and offline mode are those of `huggingface_hub`.
"""

import re
from pathlib import Path
from typing import Any, Literal

from lora_gen_jax.errors import CheckpointError, ModelError
from lora_gen_jax.untrusted import reason_of

HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9_][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w.-]+))?")
_SNAPSHOT = re.compile(r"models--(?P<org>.+?)--(?P<name>.+)/snapshots/(?P<commit>[0-9a-f]{40})")


def download(name: str, what: Literal["model", "generator"], files: list[str], cached: bool = False) -> Path:
    """The files of a repository.

    Args:
        name: matches `HUB_ID`.
        what: it should be, for errors.
        files: names or patterns; no others are downloaded.
        cached: take what is in the cache, and ask nobody.

    Raises:
        ModelError, CheckpointError: when there is no such repository or revision, or it cannot be downloaded.
    """
    import huggingface_hub

    found = HUB_ID.fullmatch(name)
    assert found is not None
    try:
        return Path(
            huggingface_hub.snapshot_download(
                found["id"], revision=found["revision"], allow_patterns=files, local_files_only=cached
            )
        )
    except Exception as error:  # the hub's client lets errors of several HTTP libraries through
        kind, field = (ModelError, "model") if what == "model" else (CheckpointError, "--checkpoint")
        raise kind(
            f"{field} {name} is not a directory here, and could not be downloaded from the Hugging Face hub"
            f" ({reason_of(error)})",
            field=field,
            code="hub",
            remedy="Check the name, the network and HF_HUB_OFFLINE; what is private or gated needs `hf auth login`",
        ) from error


def name_of(directory: Any) -> str | None:
    """``org/name@commit``, where a directory lies in the hub's cache; else None."""
    found = _SNAPSHOT.search(str(directory))
    return None if found is None else f"{found['org']}/{found['name']}@{found['commit']}"
