"""Checkpoints of the trainable tree: written while training, read back to resume or to specialize.

A step's directory holds three items, so that each reader takes what it needs: `generator` (params and batch
statistics), `optimizer` (its state and the step), `data` (the input iterator's place), beside `metadata` with the
config, the fingerprints of the frozen models and versions. The metadata also hold a SHA-256 of every array, of the
iterator's place and of themselves, which reading compares: storage notices damage to its lists, but not to the arrays.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import jax

from lora_gen_jax.config import Config
from lora_gen_jax.config_file import from_json, to_json
from lora_gen_jax.errors import CheckpointError, LoraGenError, OutputError
from lora_gen_jax.training.bucket import absolute, is_bucket, location, remote_errors
from lora_gen_jax.training.digests import compare_digests, digests_of, opened, sealed
from lora_gen_jax.training.portable import SHIPPED, TENSORS, check_generator, load_portable
from lora_gen_jax.training.published import fetch_generator
from lora_gen_jax.training.step import TrainState
from lora_gen_jax.untrusted import reason_of

log = logging.getLogger(__name__)
PACKAGES = ("lora_gen_jax", "jax", "flax", "optax", "orbax-checkpoint", "transformers")
ITEMS = ("generator", "optimizer", "data", "metadata")
_Read = TypeVar("_Read")

# Orbax logs every save and restore at INFO and reports on its own threads; a run has its own progress.
logging.getLogger("absl").setLevel(logging.ERROR)


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


class Checkpoints:
    """The checkpoints of one run: the newest `keep` ones and the best (lowest validation loss).

    Args:
        directory: a `location`.
        keep: that many.

    Raises:
        OutputError: when it cannot be used.
        CheckpointError: when what lies there cannot be listed.
    """

    def __init__(self, directory: Any, keep: int):
        import orbax.checkpoint as ocp

        policies = ocp.checkpoint_managers
        preserve = policies.AnyPreservationPolicy(
            [
                policies.LatestN(keep),
                policies.BestN(
                    get_metric_fn=lambda metrics: metrics["validation_loss"],
                    reverse=True,
                    n=1,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preserve,
            # Beside the policy this has a step's validation loss written, so that the best is known after resuming.
            best_fn=lambda metrics: metrics["validation_loss"],
            best_mode="min",
            cleanup_tmp_directories=True,
            # Which step is the newest is process 0's word: on a network's file system others may see it later.
            single_host_load_and_broadcast=True,
        )
        self.directory = absolute(directory)
        self._errors = remote_errors(self.directory)
        try:
            with self._writing():
                self.manager = ocp.CheckpointManager(self.directory, options=options, item_names=ITEMS)
        except OutputError:
            raise
        except Exception as error:  # whatever damaged lists make storage raise
            raise CheckpointError(
                f"the checkpoints in {self.directory} cannot be listed: {reason_of(error)}",
                field="checkpoint",
                code="damaged",
                remedy="Delete the newest step's directory to go on from the one before",
            ) from error

    def save(self, state: TrainState, data_state: Any, metadata: dict[str, Any], validation_loss: float | None) -> None:
        """Starts writing; training goes on meanwhile. A checkpoint appears under its step only when complete.

        Raises:
            OutputError: when this one, or the one before, cannot be written.
        """
        import orbax.checkpoint as ocp

        optimizer = {"opt_state": state.opt_state, "step": state.step}
        digests = digests_of({"generator": state.variables, "optimizer": optimizer, "data": data_state})
        items = ocp.args.Composite(
            generator=ocp.args.StandardSave(state.variables),
            optimizer=ocp.args.StandardSave(optimizer),
            data=ocp.args.JsonSave(data_state),
            metadata=ocp.args.JsonSave(sealed(metadata | {"sha256": digests})),
        )
        metrics = None if validation_loss is None else {"validation_loss": validation_loss}
        with self._writing():
            self.manager.save(int(state.step), args=items, metrics=metrics)

    def check(self) -> None:
        """Raises OutputError where writing in the background has failed."""
        with self._writing():
            self.manager.check_for_errors()

    def wait(self) -> None:
        """Until everything is on disk.

        Raises:
            OutputError: when it cannot be written.
        """
        with self._writing():
            self.manager.wait_until_finished()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, *self._errors) as error:  # a full disk is a ValueError of who writes arrays
            cause = "may this machine write to the bucket?" if self._errors else "is the disk full?"
            cause += " was another process lost?" * (jax.process_count() > 1)
            raise OutputError(
                f"a checkpoint in {self.directory} cannot be written: {reason_of(error)}",
                field="--bucket" if self._errors else "--workdir",
                code="unwritable",
                remedy=f"Mend that ({cause}): the same command goes on from the newest checkpoint that is complete",
            ) from error

    @property
    def latest(self) -> int | None:
        """The newest complete step."""
        return self.manager.latest_step()

    def made_with(self) -> tuple[dict[str, str], dict[str, str]]:
        """(fingerprints of the models, contents of the tasks) that the newest readable checkpoint was trained with.

        Raises:
            CheckpointError: when none can be read.
        """

        import orbax.checkpoint as ocp

        def read(step: int) -> tuple[dict[str, str], dict[str, str]]:
            found: Any = self.manager.restore(step, args=ocp.args.Composite(metadata=ocp.args.JsonRestore()))
            metadata = opened(found.metadata)
            return metadata["fingerprints"], metadata.get("tasks") or {}

        return self._newest(read)[1]

    def restore(self, state: TrainState) -> tuple[TrainState, Any]:
        """The newest state, in the shapes, types and shardings of `state`, and the data iterator's place.

        Of a run in one process whose newest checkpoints in its directory are damaged, the newest that is not; the
        damaged ones are set aside as <step>.damaged.

        Raises:
            CheckpointError: when none can be read, or has these shapes.
        """
        import orbax.checkpoint as ocp

        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        items = ocp.args.Composite(
            generator=ocp.args.StandardRestore(like.variables),
            optimizer=ocp.args.StandardRestore({"opt_state": like.opt_state, "step": like.step}),
            data=ocp.args.JsonRestore(),
            metadata=ocp.args.JsonRestore(),
        )

        def read(step: int) -> Any:
            found: Any = self.manager.restore(step, args=items)
            parts = {"generator": found.generator, "optimizer": found.optimizer, "data": found.data}
            compare_digests(opened(found.metadata), parts, str(step))
            return found

        step, found = self._newest(read)
        damaged_steps = [other for other in self.manager.all_steps() if other > step]
        for damaged in damaged_steps:
            aside = self.directory / f"{damaged}.damaged"
            log.warning("checkpoint %d is damaged: set aside as %s; going on from step %d", damaged, aside, step)
            with self._writing():
                (self.directory / str(damaged)).rename(aside)
        if damaged_steps:
            self.manager.reload()
        restored = TrainState(
            found.optimizer["step"],
            found.generator["params"],
            found.generator["batch_stats"],
            found.optimizer["opt_state"],
        )
        return restored, found.data

    def _newest(self, read: Callable[[int], _Read]) -> tuple[int, _Read]:
        """(step, what was read) of the newest checkpoint that can be read; CheckpointError of the newest, if none can.

        In a bucket, and for several processes, only the newest is tried: all of them would have to go back together.
        """
        steps = sorted(self.manager.all_steps(), reverse=True)
        first: Exception | None = None
        for step in steps if not self._errors and jax.process_count() == 1 else steps[:1]:
            try:
                return step, read(step)
            except Exception as error:  # whatever storage raises for damaged bytes
                first = first or error
        raise CheckpointError(
            f"checkpoint {self.manager.directory / str(steps[0])} cannot be restored: {reason_of(first or KeyError())}",
            field="checkpoint",
            code="damaged",
            remedy="Delete that step's directory to go on from the one before",
        ) from first

    def close(self) -> None:
        """Waits, as `wait`, and ends the threads that write."""
        try:
            self.wait()
        finally:
            with self._writing():
                self.manager.close()


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
        raise CheckpointError(
            f"checkpoint {directory} is damaged or incomplete: {reason}",
            field="--checkpoint",
            code="damaged",
            remedy=None if older is None else f"Give --checkpoint {older} for another of that run",
        ) from error


def find_checkpoint(config: Config, named: Path | None = None) -> Loaded:
    """The generator for a config: the one named, else that of its work directory, else the one shipped for it.

    Raises:
        CheckpointError: when there is none.
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
    """A run goes on with the rows that it began with.

    Args:
        expected: as `data.tasks.contents` gave them; empty for a checkpoint of a version that did not note them.
        found: what they are now.
        what: the run.

    Raises:
        CheckpointError: naming the tasks that were changed.
    """
    if changed := sorted(source for source in expected if expected[source] != found.get(source)):
        raise CheckpointError(
            f"{what} was trained on other rows of {', '.join(changed)}",
            field="data",
            remedy="put the data back as it was, or name another --workdir",
        )


def check_method(loaded: Loaded, method: str) -> None:
    """A checkpoint must hold the method that is asked of it.

    Raises:
        CheckpointError: when it was trained with another one.
    """
    if loaded.config.method != method:
        raise CheckpointError(
            f"{loaded.path} was trained with method {loaded.config.method}, not {method}", field="method"
        )


def check_models(expected: dict[str, str], found: dict[str, str], what: str) -> None:
    """A generator works with the models it was trained on alone.

    Raises:
        CheckpointError: naming the model that differs.
    """
    for name in ("cloud", "edge"):
        if expected.get(name) != found[name]:
            raise CheckpointError(
                f"{what} was made for another {name} model (fingerprint {expected.get(name)}, loaded {found[name]})",
                field=f"{name}.source",
                remedy=f"load the model it was trained on ({name}.source)",
            )
