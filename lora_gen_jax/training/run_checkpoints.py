"""The checkpoints of a run: written while it trains, and read back to resume.

A step's directory holds three items, so that each reader takes what it needs: `generator` (params and batch
statistics), `optimizer` (its state and the step), `data` (the input iterator's place), beside `metadata` with the
config, the fingerprints of the frozen models and versions. The metadata also hold a SHA-256 of every array, of the
iterator's place and of themselves, which reading compares: storage notices damage to its lists, but not to the arrays.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import jax

from lora_gen_jax.errors import CheckpointError, OutputError
from lora_gen_jax.training.bucket import absolute, remote_errors
from lora_gen_jax.training.checkpoint import compare_digests, digests_of, drop_late_reads, opened, sealed
from lora_gen_jax.training.step import TrainState
from lora_gen_jax.untrusted import reason_of

log = logging.getLogger(__name__)
ITEMS = ("generator", "optimizer", "data", "metadata")
_Read = TypeVar("_Read")

# Orbax logs every save and restore at INFO and reports on its own threads; a run has its own progress.
logging.getLogger("absl").setLevel(logging.ERROR)


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

        def loss(metrics: Any) -> float:
            return metrics["validation_loss"]

        best = policies.BestN(get_metric_fn=loss, reverse=True, n=1, keep_checkpoints_without_metrics=False)
        preserve = policies.AnyPreservationPolicy([policies.LatestN(keep), best])
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preserve,
            # Beside the policy this has a step's validation loss written, so that the best is known after resuming.
            best_fn=loss,
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
            problem = f"the checkpoints in {self.directory} cannot be listed: {reason_of(error)}"
            remedy = "Delete the newest step's directory to go on from the one before"
            raise CheckpointError(problem, field="checkpoint", code="damaged", remedy=remedy) from error

    def save(self, state: TrainState, data_state: Any, metadata: dict[str, Any], validation_loss: float | None) -> None:
        """Starts writing; training goes on meanwhile. A checkpoint appears under its step only when complete.

        OutputError when this one, or the one before, cannot be written.
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
        """Until everything is on disk; OutputError when it cannot be written."""
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
        """(fingerprints of the models, contents of the tasks) that the newest readable checkpoint was trained with."""
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

        Raises CheckpointError when none can be read, or has these shapes.
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
        generator, optimizer = found.generator, found.optimizer
        parts = (optimizer["step"], generator["params"], generator["batch_stats"], optimizer["opt_state"])
        return TrainState(*parts), found.data

    def _newest(self, read: Callable[[int], _Read]) -> tuple[int, _Read]:
        """(step, what was read) of the newest checkpoint that can be read; CheckpointError of the newest, if none can.

        In a bucket, and for several processes, only the newest is tried: all of them would have to go back together.
        """
        drop_late_reads()
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
