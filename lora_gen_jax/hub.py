"""The Hugging Face hub: models and generators by name, in the hub's own cache.

In: ``org/name``, or ``org/name@revision`` for a commit, tag or branch. Out: a directory with the files, downloaded
where they are not in the cache yet. Tokens, the cache's place and offline mode are those of `huggingface_hub`.
"""

import re
from pathlib import Path
from typing import Any, Literal

from lora_gen_jax.errors import CheckpointError, LoraGenError, ModelError
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
        raise _failed(error, found["id"], found["revision"], what) from error


def name_of(directory: Any) -> str | None:
    """``org/name@commit``, where a directory lies in the hub's cache; else None."""
    found = _SNAPSHOT.search(str(directory))
    return None if found is None else f"{found['org']}/{found['name']}@{found['commit']}"


def _failed(error: Exception, hub_id: str, revision: str | None, what: str) -> LoraGenError:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    kind, field = (ModelError, "model") if what == "model" else (CheckpointError, "--checkpoint")
    name = hub_id if what == "model" else f"{field} {hub_id}"
    if isinstance(error, GatedRepoError):
        return kind(
            f"{name} asks you to accept its license",
            field=field,
            code="gated",
            remedy="do so on its page, then `hf auth login`",
        )
    if isinstance(error, RepositoryNotFoundError):
        return kind(
            f"{name} is neither a directory here nor a {what} on the Hugging Face hub",
            field=field,
            code="not found",
            remedy="check the name; if it is private, `hf auth login`",
        )
    if isinstance(error, RevisionNotFoundError):
        return kind(
            f"{name} has no revision {revision} on the Hugging Face hub",
            field=field,
            code="no revision",
            remedy="give one of its commits, tags or branches",
        )
    return kind(
        f"{name} is not a directory here and could not be downloaded from the Hugging Face hub ({reason_of(error)})",
        field=field,
        code="unreachable",
        remedy="Check the network and HF_HUB_OFFLINE, or give a local directory",
    )
