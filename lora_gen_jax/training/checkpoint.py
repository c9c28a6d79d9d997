"""Checkpoints of the trainable tree, read back to specialize, and what they say about themselves.

In: a directory, a name, or an address in a bucket. Out: `Loaded`, or an error where what is read is not what was
written, or belongs to other models. `run_checkpoints.py` writes them, and says what a step's directory holds.
"""

import dataclasses
import logging
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from lora_gen_jax.config import Config
from lora_gen_jax.config_file import from_json, to_json
from lora_gen_jax.errors import CheckpointError, LoraGenError
from lora_gen_jax.training.bucket import absolute, is_bucket, location, remote_errors
from lora_gen_jax.training.portable import SCHEMA, SHIPPED, TENSORS, check_generator, load_portable
from lora_gen_jax.training.published import fetch_generator
from lora_gen_jax.untrusted import check_digests, check_fields, digest_of, reason_of

log = logging.getLogger(__name__)
METADATA = SCHEMA | {"tasks": dict[str, str] | None, "sha256_of_this": str | None}
PACKAGES = ("lora_gen_jax", "jax", "flax", "optax", "orbax-checkpoint", "transformers")


def versions() -> dict[str, str]:
    """Versions of the packages that results depend on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except ModuleNotFoundError:  # the package itself, imported from a checkout that is not installed
            found[name] = "not installed"
    return found


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A generator as a checkpoint holds it.

    Attributes:
        step: updates made.
        variables: {"params", "batch_stats"}.
        config: of the run.
        fingerprints: of the cloud and the edge model it was trained on.
        versions: of the packages it was trained with.
        path: the step's directory, or what behaves as one in a bucket.
    """

    step: int
    variables: dict[str, Any]
    config: Config
    fingerprints: dict[str, str]
    versions: dict[str, str]
    path: Path


def step_directory(path: Any) -> Any:
    """The step's directory that `path` means: itself, or the newest of a work directory.

    Args:
        path: a `location`.

    Raises:
        CheckpointError: when there is none.
    """
    if (path / "generator").is_dir():
        return path
    for parent in (path / "checkpoints", path):
        steps = [p for p in parent.glob("*") if p.name.isdigit() and complete(p)]
        if steps:
            return max(steps, key=lambda p: int(p.name))
    raise CheckpointError(
        f"{path} holds no checkpoint",
        field="--checkpoint",
        code="none",
        remedy="give a run's work directory, one of its checkpoints/<step> directories, what `pack` wrote, the name of"
        f" a shipped generator ({', '.join(SHIPPED)}) or of one on the Hugging Face hub (org/name)",
    )


def complete(step: Any) -> bool:
    """Whether a step's directory holds a generator and, in a bucket, was written to its end."""
    if not is_bucket(step) or not (step / "generator").is_dir():
        return (step / "generator").is_dir()
    import orbax.checkpoint as ocp

    return ocp.utils.is_checkpoint_finalized(step)


def load_checkpoint(path: str | Path) -> Loaded:
    """The generator of a run's newest checkpoint, of one step's directory, or of a portable directory.

    Where there is no such directory, the name of a shipped generator will do, or that of one on the Hugging Face hub
    (org/name, or org/name@revision). No optimizer state is read.

    Args:
        path: a directory, a name, or for checkpoints an address in a bucket (gs://NAME/DIR).

    Raises:
        CheckpointError: when there is none, it cannot be downloaded, or it is damaged.
        ConfigError: for an address, where gcsfs is not installed.
    """
    place: Any = location(path)
    try:
        if not place.exists():
            place = SHIPPED.get(str(path)) or fetch_generator(str(path)) or place
        if not is_bucket(place) and (place / TENSORS).is_file():
            return Loaded(**load_portable(place))
        directory = absolute(step_directory(place))
    except (OSError, *remote_errors(place)) as error:
        raise CheckpointError(f"{place} cannot be read: {error}", field="--checkpoint", code="unreadable") from error
    import orbax.checkpoint as ocp  # a portable generator is read without it

    drop_late_reads()
    try:
        handler = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
        items = ocp.args.Composite(
            generator=ocp.args.StandardRestore(None, fallback_sharding=_one_device()), metadata=ocp.args.JsonRestore()
        )
        found = handler.restore(directory, args=items)
        metadata = opened(found.metadata)
        # On the host: on one device they could not meet models that lie on several.
        variables = jax.device_get(found.generator)
        compare_digests(metadata, {"generator": variables}, directory.name)
        config = from_json(metadata["config"])
        check_generator(variables, config, directory.name)
        return Loaded(
            step=metadata["step"],
            variables=variables,
            config=config,
            fingerprints=metadata["fingerprints"],
            versions=metadata["versions"],
            path=directory,
        )
    except Exception as error:  # whatever storage raises for damaged bytes
        reason = error.problem if isinstance(error, LoraGenError) else reason_of(error)
        others = [
            p for p in directory.parent.glob("*") if p.name.isdigit() and p.name != directory.name and complete(p)
        ]
        older = max(others, key=lambda p: int(p.name), default=None)
        problem = f"checkpoint {directory} is damaged or incomplete: {reason}"
        remedy = None if older is None else f"Give --checkpoint {older} for another of that run"
        raise CheckpointError(problem, field="--checkpoint", code="damaged", remedy=remedy) from error


def find_checkpoint(config: Config, named: Path | None = None) -> Loaded:
    """The generator for a config: the one named, else that of its work directory, else the one shipped for it.

    Raises CheckpointError when there is none.
    """
    shipped = SHIPPED.get(config.name) if config.bucket is None else None
    if named is None and shipped is not None and not any((config.directory / "checkpoints").glob("*")):
        log.info("%s holds no run: the generator shipped for %s is used", config.directory, config.name)
        return load_checkpoint(shipped)
    # The run's own directory is absolute here: "runs/NAME" would be a name on the hub, too.
    return load_checkpoint(named or absolute(location(config.saved)))


def _one_device() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def metadata_of(config: Config, fingerprints: dict[str, str], contents: dict[str, str], step: int) -> dict[str, Any]:
    """What a checkpoint says about itself; `contents` are those of the tasks it was trained on."""
    made_with = {"fingerprints": fingerprints, "tasks": contents, "versions": versions()}
    return {"step": step, "config": to_json(config), **made_with}


def check_tasks(expected: dict[str, str], found: dict[str, str], what: str) -> None:
    """Raises CheckpointError unless a run goes on with the rows that it began with (`data.tasks.contents`).

    Nothing is expected by a checkpoint of a version that did not note them.
    """
    if changed := sorted(source for source in expected if expected[source] != found.get(source)):
        problem = f"{what} was trained on other rows of {', '.join(changed)}"
        raise CheckpointError(problem, field="data", remedy="put the data back as it was, or name another --workdir")


def check_method(loaded: Loaded, method: str) -> None:
    """Raises CheckpointError for a checkpoint of another method than the one that is asked of it."""
    if loaded.config.method != method:
        problem = f"{loaded.path} was trained with method {loaded.config.method}, not {method}"
        raise CheckpointError(problem, field="method")


def check_models(expected: dict[str, str], found: dict[str, str], what: str) -> None:
    """Raises CheckpointError for other models than a generator was trained on: it works with no others."""
    for name in ("cloud", "edge"):
        if expected.get(name) != found[name]:
            raise CheckpointError(
                f"{what} was made for another {name} model (fingerprint {expected.get(name)}, loaded {found[name]})",
                field=f"{name}.source",
                remedy=f"load the model it was trained on ({name}.source)",
            )


def drop_late_reads() -> None:
    """Once one array could not be read, Orbax's reads of the others, which end later, print a page each that nobody
    waits for them, in which an error's one line is lost: these are not printed."""
    hook = sys.unraisablehook
    if getattr(hook, "drops_late_reads", False):
        return

    def quieter(raised: Any) -> None:
        if not str(raised.exc_value).startswith(("Event loop is closed", "Encountered error while reading array")):
            hook(raised)

    quieter.drops_late_reads = True  # pyright: ignore[reportFunctionMemberAccess]
    sys.unraisablehook = quieter


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

    Raises CheckpointError when they are not what was written, or lack something.
    """
    if not isinstance(metadata, dict):
        raise CheckpointError("the metadata are not an object", field="metadata", code="type")
    check_fields(metadata, METADATA, "metadata", CheckpointError)
    if "sha256" in metadata or "sha256_of_this" in metadata:
        rest = {name: value for name, value in metadata.items() if name != "sha256_of_this"}
        check_digests({"metadata": digest_of(rest)}, {"metadata": metadata.get("sha256_of_this") or ""}, "metadata")
    return metadata
