"""A training run from config to last checkpoint.

In: a `Config`. Out: the work directory: config.json, metrics.jsonl, tensorboard/, checkpoints/<step>/.
A run starts in this order: its own checkpoint (resume), else `train.start_from`, else fresh parameters. Running the
same command again resumes, on other devices and in another number of processes too; another config in the same
directory is an error that shows the difference. SIGTERM and Ctrl-C end a run after the step they came in, with a
checkpoint.
"""

import dataclasses
import math
import time
from contextlib import ExitStack, closing
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lora_gen_jax.config import Config
from lora_gen_jax.data.pipeline import Batch, TrainingBatches, build_batch, validation_batches
from lora_gen_jax.data.tasks import contents
from lora_gen_jax.errors import LoraGenError, Stopped
from lora_gen_jax.methods.registry import make_generator
from lora_gen_jax.models import Pair, check_variables, load_pair, precision_of
from lora_gen_jax.sharding import make_mesh
from lora_gen_jax.training.bucket import BucketOwner, location, run_lock
from lora_gen_jax.training.checkpoint import (
    Loaded,
    check_method,
    check_models,
    check_tasks,
    load_checkpoint,
    metadata_of,
)
from lora_gen_jax.training.distributed import StopSignals
from lora_gen_jax.training.fit import fitted
from lora_gen_jax.training.optimizer import make_optimizer
from lora_gen_jax.training.prepare import (
    check_rows,
    check_same_rows,
    check_shapes,
    keep_freed_memory,
    make_sampler,
    place,
    prepare_directory,
    shard_of,
    training_tasks,
    with_steps,
)
from lora_gen_jax.training.progress import Recorder
from lora_gen_jax.training.reader import teach_reader
from lora_gen_jax.training.run_checkpoints import Checkpoints
from lora_gen_jax.training.step import TrainState, init_state, make_train_step, make_validation_step


class TrainingDivergedError(LoraGenError):
    """A loss or gradient is not finite; the last good checkpoint is kept."""


@dataclasses.dataclass
class Run:
    """What a training run works with, after set-up."""

    config: Config
    pair: Pair
    contents: dict[str, str]
    mesh: Mesh
    state: TrainState
    train_step: Any
    validate: Any
    batches: TrainingBatches
    held_out: list[Batch]
    checkpoints: Checkpoints
    bucket_owner: BucketOwner
    kept: str | None = None

    def place(self, batch: Batch) -> Batch:
        """This process's part of a batch as global arrays, rows split over the mesh."""
        return place(batch, self.mesh)

    def save(self, step: int, validation_loss: float | None) -> None:
        """Starts writing the checkpoint of this step, the newest.

        Raises OutputError when it cannot be written, or another run writes to the same bucket.
        """
        self.checkpoints.wait()  # for the one before, as saving would: what is checked is true when this one is written
        self.bucket_owner.check()
        metadata = metadata_of(self.config, self.pair.fingerprints, self.contents, step)
        self.checkpoints.save(self.state, self.batches.get_state(), metadata, validation_loss)


def train(config: Config) -> TrainState:
    """Trains, or goes on training, and returns the last state.

    Raises:
        LoraGenError: for bad input, before anything is written; `TrainingDivergedError` for a loss that is not finite.
        Stopped: after SIGTERM or Ctrl-C, with the checkpoint saved.
    """
    # Tasks and models first: bad input must not leave a work directory behind.
    tasks = training_tasks(config)
    config = with_steps(config, tasks)
    keep_freed_memory()
    mesh = make_mesh(**dataclasses.asdict(config.mesh))
    check_rows(config, mesh)
    pair = load_pair(config, mesh, training=True)
    check_shapes(config, pair)
    make_generator(config, pair)
    start = starting_generator(config, pair)
    shard = shard_of(config, mesh)
    sampler, held_out = (make_sampler(config, pair, tasks, split) for split in ("train", "validation"))
    assert sampler is not None
    first = build_batch(sampler, (config.train.seed, 0), shard)
    check_same_rows(rows := contents(tasks))
    fixed = [] if held_out is None else validation_batches(held_out, config.train.validation_batches, shard)
    prepare_directory(config)
    batches = TrainingBatches(sampler, config.train.seed, config.train.steps, shard)
    # Modules find the mesh in the context, and say there how activations are split.
    with jax.set_mesh(mesh), closing(batches), run_lock(config.directory):
        run = set_up(config, pair, rows, mesh, batches, place(first, mesh), start)
        run.held_out = [place(batch, mesh) for batch in fixed]
        # Signals are noted until the last checkpoint is on disk.
        with StopSignals() as signals, closing(run.checkpoints):
            loop(run, signals)
        if config.compare and signals.received is not None and not signals.together:
            raise Stopped(signals.received, config.train.steps)
        return run.state


def set_up(
    config: Config,
    pair: Pair,
    rows: dict[str, str],
    mesh: Mesh,
    batches: TrainingBatches,
    example: Batch,
    start: Loaded | None = None,
) -> Run:
    """Compiled steps, and the state: restored, with the place of `batches`, where the directory has a checkpoint.

    `rows` are the `contents` of the tasks, `example` only gives shapes, a new run begins with `start`. No batch is held
    out yet.

    Raises:
        CheckpointError: when the checkpoint there was trained on other models or other rows.
        OutputError: when the place of checkpoints cannot be used.
    """
    pair, kept = fitted(config, pair, mesh, example)
    generator, optimizer = make_generator(config, pair), make_optimizer(config.train)
    checkpoints = Checkpoints(location(config.saved) / "checkpoints", config.train.keep_checkpoints)
    if checkpoints.latest is not None:
        models, tasks = checkpoints.made_with()
        check_models(models, pair.fingerprints, f"the run in {config.saved}")
        check_tasks(tasks, rows, f"the run in {config.saved}")
    state = init_state(generator, optimizer, pair.frozen, example, config.train.seed)
    state = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
    if checkpoints.latest is not None:
        state, data_state = checkpoints.restore(state)
        batches.set_state(data_state)
    elif start is not None:
        state = beginning_with(state, start)
    elif config.train.reader_prompts:
        first_prompts = (place(batch, mesh) for batch in batches.reader_batches(config.train.reader_prompts))
        state = teach_reader(state, generator, pair.frozen["cloud"], first_prompts, config)
    return Run(
        config=config,
        pair=pair,
        contents=rows,
        mesh=mesh,
        state=state,
        train_step=make_train_step(generator, pair.edge.decoder, optimizer, config),
        validate=make_validation_step(generator, pair.edge.decoder, config),
        batches=batches,
        held_out=[],
        checkpoints=checkpoints,
        # Not before: a run that cannot start takes nothing from one that goes on.
        bucket_owner=BucketOwner(config),
        kept=kept,
    )


def starting_generator(config: Config, pair: Pair) -> Loaded | None:
    """The generator that a new run begins with; None for fresh parameters, and for a run that goes on.

    Raises CheckpointError when it cannot be read, or is of another method, shape or pair of models.
    """
    if config.train.start_from is None or any((location(config.saved) / "checkpoints").glob("*")):
        return None
    loaded = load_checkpoint(config.train.start_from)
    check_method(loaded, config.method)
    check_models(loaded.fingerprints, pair.fingerprints, str(loaded.path))
    check_variables(loaded, make_generator(config, pair), pair)
    return loaded


def beginning_with(state: TrainState, loaded: Loaded) -> TrainState:
    """A fresh state with the parameters and statistics of another generator."""

    def placed(new: Any, old: jax.Array) -> jax.Array:
        # A portable generator has its scalars as vectors of one.
        return jax.device_put(np.asarray(new, old.dtype).reshape(old.shape), old.sharding)

    start = {"params": loaded.variables["params"], "batch_stats": loaded.variables.get("batch_stats", {})}
    return state.replace(**jax.tree.map(placed, start, state.variables))


def loop(run: Run, signals: StopSignals) -> None:
    """Steps until the last, or a signal; metrics of a step are fetched while the next one runs.

    Raises Stopped, TrainingDivergedError as `train`.
    """
    config, t = run.config, run.config.train
    start, frozen = int(run.state.step), run.pair.frozen
    # A trace that a failing step leaves open is closed, and so written, by the stack.
    with Recorder(config.directory, start, t.steps) as recorder, ExitStack() as trace:
        announce(run, recorder, start)
        if (early := signals.stop()) is not None:
            raise Stopped(early, start)
        if start == 0:
            _validate(run, recorder, 0)
        pending: _Pending | None = None
        for step in range(start + 1, t.steps + 1):
            batch = next(run.batches)
            if t.profile and step == min(start + 5, t.steps):
                jax.profiler.start_trace(str(config.directory / "profile"))
                trace.callback(jax.profiler.stop_trace)
            run.state, metrics = run.train_step(run.state, frozen, run.place(batch))
            if pending is not None:
                pending.finish(recorder)
            pending = _Pending(step, metrics, _tokens(batch, config.data.prompts_per_step))
            last = step == t.steps
            # After the last step there may be methods to compare with.
            stop = None if last and not config.compare else signals.stop()
            if t.profile and step == min(start + 8, t.steps):
                jax.block_until_ready(metrics)
                trace.close()
            validates = last or step % t.validate_every == 0
            saves = last or step % t.checkpoint_every == 0 or stop is not None
            if validates or saves:
                # Nothing is validated or saved before this step's loss is known to be finite.
                pending.finish(recorder)
                pending = None
                validated = _validate(run, recorder, step) if validates else None
                if saves:
                    run.save(step, validated)
            if stop is not None:
                raise Stopped(stop, step)
            run.checkpoints.check()


def announce(run: Run, recorder: Recorder, start: int) -> None:
    """Says what will happen and where."""
    count = sum(x.size for x in jax.tree.leaves(run.state.params))
    where = f"resuming at step {start}" if start else "starting"
    recorder.say(
        f"{where}: {lengths(run.config)}, {count:,} trainable parameters, "
        f"{jax.device_count()} {jax.devices()[0].platform} device(s), {precisions(run.pair)},"
        f" into {run.config.directory}" + (f", checkpoints into {run.config.bucket}" if run.config.bucket else "")
    )
    if run.kept is not None:
        recorder.say(run.kept)
    t = run.config.train
    if t.warmup != t.warmup_steps:
        recorder.say(f"train.warmup_steps is {t.warmup_steps}, shortened to {t.warmup}: the run has {t.steps} steps")


def lengths(config: Config) -> str:
    """How long a run is, in steps and, where they follow from these, in epochs."""
    t, d = config.train, config.data
    of = "" if t.epochs is None else f" of {d.prompts_per_step} × {d.queries_per_prompt} queries ({t.epochs:g} epochs)"
    return f"{t.steps} steps{of}"


def precisions(pair: Pair) -> str:
    """The types that the two models are computed in, as `ModelConfig.dtype` calls them."""
    cloud, edge = precision_of(pair.cloud), precision_of(pair.edge)
    return cloud if cloud == edge else f"cloud {cloud}, edge {edge}"


def _tokens(batch: Batch, prompts: int) -> int:
    # Of all processes, taken to have as many each as this one.
    here = int(np.sum(batch.prompts.positions_BT >= 0) + np.sum(batch.positions_PT >= 0))
    return here * prompts // len(batch.positions_PT)


class _Pending:
    """A step that was dispatched and whose metrics have not been looked at."""

    def __init__(self, step: int, metrics: dict[str, jax.Array], tokens: int):
        self.step, self.metrics, self.tokens, self.began = step, metrics, tokens, time.monotonic()

    def finish(self, recorder: Recorder) -> None:
        """Waits for the step, checks that it is finite and records it."""
        values = {name: float(value) for name, value in jax.device_get(self.metrics).items()}
        # Steps overlap with the host: a step's time runs from the end of the one before, if that came later.
        end = time.monotonic()
        seconds, recorder.step_end = end - max(self.began, recorder.step_end), end
        bad = [name for name in ("loss", "grad_norm") if not math.isfinite(values[name])]
        if bad:
            problem = f"step {self.step}: {bad[0]} is {values[bad[0]]}. Training stopped; the last checkpoint is good"
            remedy = "Lower train.learning_rate, lengthen train.warmup_steps or set train.clip_norm"
            raise TrainingDivergedError(problem, field=bad[0], remedy=remedy)
        recorder.record(self.step, values | {"tokens_per_second": self.tokens / seconds, "step_seconds": seconds})


def _validate(run: Run, recorder: Recorder, step: int) -> float | None:
    if not run.held_out:
        return None
    variables = run.state.variables if step else None
    losses = [run.validate(variables, run.pair.frozen, batch) for batch in run.held_out]
    loss = float(np.mean([float(x) for x in losses]))
    recorder.record(step, {"validation_loss": loss})
    recorder.say(f"step {step}: validation loss {loss:.4f}" + ("" if step else " (the base model's own)"))
    return loss
