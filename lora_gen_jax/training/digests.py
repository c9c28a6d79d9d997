"""What a checkpoint says about itself, and whether what is read is what was written.

In: trees of arrays, metadata. Out: a SHA-256 of every leaf, to be stored beside them; an error where one differs.
"""

from typing import Annotated, Any

import jax

from lora_gen_jax.errors import CheckpointError
from lora_gen_jax.untrusted import check_digests, check_fields, digest_of

METADATA = {
    "step": Annotated[int, 0, 2**53],
    "config": dict,
    "fingerprints": dict[str, str],
    "versions": dict[str, str],
    "tasks": dict[str, str] | None,
    "sha256": dict[str, str] | None,
    "sha256_of_this": str | None,
}


def digests_of(parts: dict[str, Any]) -> dict[str, str]:
    """{path of a leaf: its SHA-256} of trees of arrays; "data" is one leaf, whatever is in it."""
    data = {name: digest_of(value) for name, value in parts.items() if name == "data"}
    leaves = jax.tree_util.tree_leaves_with_path({name: tree for name, tree in parts.items() if name != "data"})
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    return data | {name: digest_of(x) for name, x in zip(names, jax.device_get([x for _, x in leaves]), strict=True)}


def compare_digests(metadata: dict[str, Any], parts: dict[str, Any], place: str) -> None:
    """Raises CheckpointError where a leaf of those parts is not what was written; older versions noted no digests."""
    if (recorded := metadata.get("sha256")) is not None:
        wanted = {name: digest for name, digest in recorded.items() if name.split("/")[0] in parts}
        check_digests(digests_of(parts), wanted, place)


def sealed(metadata: dict[str, Any]) -> dict[str, Any]:
    """Metadata with their own digest."""
    return metadata | {"sha256_of_this": digest_of(metadata)}


def opened(metadata: Any) -> dict[str, Any]:
    """Metadata that were `sealed`, or of an older version, which did not.

    Raises:
        CheckpointError: when they are not what was written, or lack something.
    """
    if not isinstance(metadata, dict):
        raise CheckpointError("the metadata are no object", field="metadata", code="type")
    check_fields(metadata, METADATA, "metadata", CheckpointError)
    if "sha256" in metadata or "sha256_of_this" in metadata:
        rest = {name: value for name, value in metadata.items() if name != "sha256_of_this"}
        check_digests({"metadata": digest_of(rest)}, {"metadata": metadata.get("sha256_of_this") or ""}, "metadata")
    return metadata
