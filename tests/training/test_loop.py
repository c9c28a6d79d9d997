"""A training run end to end on a tiny pair: it learns, resumes bit for bit, and stops on bad input with a message."""

import dataclasses
import json
import os
import shutil
import signal
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import color_rows, experiment, raises, trained, write_model, write_rows
from orbax.checkpoint import CheckpointManager

from lora_gen_jax.config import ModelConfig
from lora_gen_jax.errors import CheckpointError, ConfigError, DataError, ModelError, OutputError, Stopped
from lora_gen_jax.models import load_pair
from lora_gen_jax.training import loop
from lora_gen_jax.training.bucket import BucketOwner, run_lock
from lora_gen_jax.training.checkpoint import load_checkpoint, step_directory
from lora_gen_jax.training.distributed import StopSignals
from lora_gen_jax.training.loop import TrainingDivergedError, train
from lora_gen_jax.training.progress import Recorder
from lora_gen_jax.training.run_checkpoints import Checkpoints
from lora_gen_jax.training.step import TrainState


def lines(config):
    return [json.loads(line) for line in (config.directory / "metrics.jsonl").read_text().splitlines()]


def losses(config):
    return {line["step"]: line["loss"] for line in lines(config) if "loss" in line}


def steps_on_disk(config):
    return sorted(int(p.name) for p in (config.directory / "checkpoints").iterdir() if p.name.isdigit())


def replace(config, section, **fields):
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **fields)})


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("experiment")


@pytest.fixture(scope="module")
def whole(root):
    """A run of six steps in one go: (config, last state, batches in order)."""
    config = experiment(root, root / "whole")
    state, batches = watched(config)
    return config, state, batches


def watched(config):
    """Trains, and notes what each training batch holds."""
    seen, place = [], loop.Run.place

    def note(self, batch):
        seen.append(np.concatenate([batch.prompts.tokens_BT.ravel(), batch.tokens_PT.ravel()]))
        return place(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Run, "place", note)
        state = train(config)
    return jax.device_get(state), seen


def test_epochs_are_the_steps_that_a_line_says_and_the_run_goes_on_as_one_of_so_many(whole, root, tmp_path, capsys):
    """Fourteen training rows, 8 × 4 queries a step: 13 epochs are 5.7 steps. The batches are those of a run of six."""
    asked = experiment(root, tmp_path / "run", steps=0, epochs=13)
    state, batches = watched(asked)
    assert int(state.step) == 6
    assert "6 steps of 8 × 4 queries (13 epochs)" in capsys.readouterr().err.replace("\n", " ")
    for one, other in zip(batches, whole[2], strict=True):
        np.testing.assert_array_equal(one, other)
    jax.tree.map(np.testing.assert_array_equal, state, whole[1])
    # What was asked for, and what came of it, stand in the run's directory; the same command finds it finished.
    saved = json.loads((asked.directory / "config.json").read_text())["train"]
    assert (saved["steps"], saved["epochs"]) == (6, 13)
    assert int(train(asked).step) == 6
    with raises(CheckpointError, "--workdir", "train.epochs: 13 -> 14", code="another config"):
        train(replace(asked, "train", epochs=14))


def test_the_loss_falls_and_everything_is_written():
    config = trained()
    loss = losses(config)
    assert sorted(loss) == list(range(1, 25))
    assert np.mean([loss[n] for n in (22, 23, 24)]) < 0.6 * np.mean([loss[n] for n in (1, 2, 3)])
    validated = {line["step"]: line["validation_loss"] for line in lines(config) if "validation_loss" in line}
    assert sorted(validated) == [0, 12, 24]
    assert validated[24] < 0.6 * validated[0]
    for line in lines(config):
        if "loss" in line:
            assert {"loss", "cv", "gate_entropy", "grad_norm", "tokens_per_second", "step_seconds"} <= set(line)
            assert all(np.isfinite(v) for v in line.values())
    assert steps_on_disk(config) == [12, 24]
    assert json.loads((config.directory / "config.json").read_text())["train"]["steps"] == 24


def test_the_checkpoint_holds_the_trainable_tree_and_says_what_it_belongs_to():
    config = trained()
    loaded, pair = load_checkpoint(config.directory), load_pair(config)
    assert loaded.step == 24
    assert loaded.config == config
    assert loaded.fingerprints == pair.fingerprints
    assert set(loaded.variables) == {"params", "batch_stats"}
    assert set(loaded.variables["params"]) == {"cloud", "router", "pool"}
    one = load_checkpoint(config.directory / "checkpoints" / "12")
    assert one.step == 12
    assert np.any(one.variables["params"]["pool"]["up_b"] != loaded.variables["params"]["pool"]["up_b"])


def test_a_run_begins_with_another_generator_which_it_needs_no_more_to_go_on(whole, tmp_path):
    config, state, _ = whole
    shutil.copytree(config.directory, tmp_path / "first")
    # So small a rate moves no parameter: what the run ends with is what it began with.
    begun = replace(config, "train", steps=1, start_from=str(tmp_path / "first"), learning_rate=1e-30)
    begun = dataclasses.replace(begun, workdir=tmp_path / "begun")
    jax.tree.map(np.testing.assert_array_equal, train(begun).params, state.params)
    shutil.rmtree(tmp_path / "first")
    assert int(train(begun).step) == 1


def test_a_generator_of_another_shape_cannot_be_begun_with(whole, tmp_path):
    config = whole[0]
    other = replace(config, "train", start_from=str(config.directory))
    other = replace(other, "generator", num_experts=config.generator.num_experts + 1)
    other = dataclasses.replace(other, workdir=tmp_path / "other")
    with raises(CheckpointError, f"{step_directory(config.directory)}:batch_stats/router/norm/mean"):
        train(other)
    assert not other.directory.exists()


def test_running_a_finished_run_again_changes_nothing():
    config = trained()
    before, written = lines(config), load_checkpoint(config.directory)
    state = train(config)
    assert int(state.step) == 24
    assert lines(config) == before
    assert steps_on_disk(config) == [12, 24]
    jax.tree.map(np.testing.assert_array_equal, load_checkpoint(config.directory).variables, written.variables)


def poisoned(make, after):
    """A `make_train_step` whose step number `after` leaves NaN in the parameters, so that the next loss is NaN."""

    def made(*args):
        step = make(*args)

        def wrapped(state, frozen, batch):
            bad = int(state.step) + 1 == after
            state, metrics = step(state, frozen, batch)
            return (state.replace(params=jax.tree.map(lambda x: x * jnp.nan, state.params)) if bad else state), metrics

        return wrapped

    return made


@pytest.fixture(scope="module")
def diverged(root):
    """The same run as `whole`, ended by a loss that is not finite at step 5: (config, the error)."""
    config = experiment(root, root / "diverged")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_train_step", poisoned(loop.make_train_step, after=4))
        with pytest.raises(TrainingDivergedError) as error:
            train(config)
    return config, error.value


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(diverged):
    config, error = diverged
    assert (error.field, "step 5" in error.problem, "nan" in error.problem) == ("loss", True, True)
    assert "train.learning_rate" in error.remedy
    assert steps_on_disk(config) == [3]
    assert sorted(losses(config)) == [1, 2, 3, 4]
    loaded = load_checkpoint(config.directory)
    assert loaded.step == 3
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(loaded.variables))


def test_a_stopped_run_resumes_bit_for_bit(whole, diverged):
    """It had got to step 5, and goes on from the checkpoint of step 3."""
    complete, state, batches = whole
    config, _ = diverged
    resumed, rest = watched(config)
    assert int(resumed.step) == 6
    assert jax.tree.structure(resumed) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, resumed, state)
    # 1 - 0.9⁶: the running statistics are of six batches.
    assert float(resumed.batch_stats["router"]["norm"]["weight"]) == pytest.approx(1 - 0.9**6, rel=1e-5)
    # Data order: the batches of steps 4 to 6, and no other.
    np.testing.assert_array_equal(rest, batches[-3:])
    assert len(batches) == 6
    assert not np.array_equal(batches[-1], batches[-2])
    # Each step stands in metrics.jsonl once, with the same loss.
    assert [line["step"] for line in lines(config) if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert losses(config) == losses(complete)
    one, other = (load_checkpoint(c.directory).variables for c in (config, complete))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_another_config_in_the_same_directory_is_refused_with_the_difference(whole):
    config = whole[0]
    files = sorted(p.relative_to(config.directory) for p in config.directory.rglob("*"))
    other = replace(replace(config, "train", learning_rate=0.5), "generator", top_k=1)
    with raises(CheckpointError, "--workdir", config.directory, code="another config") as e:
        train(other)
    shown = [line.strip() for line in str(e.value).splitlines()[1:]]
    assert shown == ["generator.top_k: 2 -> 1", "train.learning_rate: 0.01 -> 0.5"]
    assert files == sorted(p.relative_to(config.directory) for p in config.directory.rglob("*"))


def test_other_weights_under_the_same_path_are_refused_on_resuming(whole, root):
    """The config is the same, the model behind it is not: the fingerprints tell."""
    (root / "model").rename(root / "old")
    try:
        write_model(root / "model", seed=9)
        with raises(CheckpointError, "cloud.source", load_checkpoint(whole[0].directory).fingerprints["cloud"]):
            train(whole[0])
    finally:
        shutil.rmtree(root / "model")
        (root / "old").rename(root / "model")


def test_other_rows_under_the_same_path_are_refused_on_resuming(whole, root):
    rows = (root / "rows.jsonl").read_text()
    try:
        first, rest = rows.split("\n", 1)
        changed = json.loads(first)
        (root / "rows.jsonl").write_text(json.dumps(changed | {"output": changed["output"] + " indeed"}) + "\n" + rest)
        with raises(CheckpointError, "data", "rows", "--workdir"):
            train(whole[0])
    finally:
        (root / "rows.jsonl").write_text(rows)
    train(whole[0])


@pytest.mark.parametrize(
    ("change", "error", "field", "facts"),
    [
        (
            lambda c: replace(c, "data", tasks=("arc_easy",), dir=c.directory / "nowhere"),
            DataError,
            "data.dir",
            ("nowhere", "--data.dir"),
        ),
        (lambda c: replace(c, "data", files=(c.directory / "no.jsonl",)), DataError, "data.files", ("no.jsonl",)),
        (lambda c: replace(c, "data", tasks=("arc_esy",)), DataError, "data.tasks", ("'arc_esy'", "'arc_easy'")),
        (lambda c: replace(c, "data", files=()), DataError, "data.tasks", ("train", "data.files")),
        (lambda c: replace(c, "edge", source="no/such/model"), ModelError, "model", ("no/such/model",)),
        (lambda c: replace(c, "data", cloud_length=9), DataError, "data.cloud_length", (9,)),
        (lambda c: replace(c, "data", source_weights=("row=2",)), ConfigError, "data.source_weights", ("'row'",)),
        (
            lambda c: replace(c, "data", source_weights=("rows=nan",)),
            ConfigError,
            "data.source_weights",
            ("'rows=nan'",),
        ),
        (lambda c: replace(c, "edge", attention="cudnn"), ConfigError, "attention", ("'cudnn'", "GPU", "CPU")),
        (lambda c: replace(c, "data", cloud_length=400), ConfigError, "data.cloud_length", (160,)),
        (lambda c: replace(c, "data", edge_length=400, query_length=200), ConfigError, "data.query_length", (160,)),
        (lambda c: replace(c, "data", prompts_per_step=6), ConfigError, "data.prompts_per_step", ("4 devices",)),
    ],
    ids=[
        *("dir", "file", "task", "no-data", "model", "room", "weights", "nan", "attention"),
        *("cloud-positions", "edge-positions", "devices"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(root, tmp_path, change, error, field, facts):
    experiment(root, root / "unused")
    config = change(experiment(root, tmp_path / "run"))
    with raises(error, field, *facts):
        train(config)
    assert list(tmp_path.iterdir()) == []


def test_conversations_need_a_chat_template(root, tmp_path):
    turns = [{"role": "user", "content": "what kind is the sun ?"}, {"role": "assistant", "content": "red"}]
    rows = write_rows(tmp_path / "mine.jsonl", [*color_rows(), *[{"task": "talk", "messages": turns}] * 3])
    config = replace(experiment(root, tmp_path / "run"), "data", files=(rows,))
    with raises(ModelError, "chat_template", "'talk'"):
        train(config)
    assert not config.directory.exists()


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_work_directory_that_cannot_be_made_is_named(root, tmp_path, place):
    (tmp_path / "file").write_text("mine")
    with raises(OutputError, "--workdir", tmp_path / place, code="unwritable"):
        train(experiment(root, tmp_path / place))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_second_run_in_a_directory_is_refused(root, tmp_path):
    """Each would take the other's unfinished checkpoints for its own old ones."""
    config = experiment(root, tmp_path)
    with run_lock(tmp_path), raises(OutputError, "--workdir", tmp_path, code="taken"):
        train(config)
    assert not (tmp_path / "checkpoints").exists()
    with run_lock(tmp_path):
        pass


def test_a_signal_while_the_last_checkpoint_is_written_waits_for_it(root, tmp_path, monkeypatch, capsys):
    close = Checkpoints.close

    def told_to_stop(self):
        os.kill(os.getpid(), signal.SIGTERM)
        close(self)

    monkeypatch.setattr(Checkpoints, "close", told_to_stop)
    before = signal.getsignal(signal.SIGTERM)
    config = replace(experiment(root, tmp_path / "alone"), "train", steps=2, warmup_steps=2, validate_every=1)
    train(config)
    assert steps_on_disk(config)[-1] == 2
    assert "train.warmup_steps is 2, shortened to 1: the run has 2 steps" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before
    # What it is compared with is not begun any more.
    compared = dataclasses.replace(config, compare=("base", "lora_gen"), workdir=tmp_path / "compared")
    with pytest.raises(Stopped) as stopped:
        train(compared)
    assert stopped.value.signal == signal.SIGTERM
    assert steps_on_disk(compared)[-1] == 2


def test_a_full_disk_is_named(root, tmp_path, monkeypatch):
    def full(self, *args, **kwargs):
        raise ValueError("RESOURCE_EXHAUSTED: no space left on device")

    monkeypatch.setattr(CheckpointManager, "save", full)
    with raises(OutputError, "--workdir", tmp_path / "checkpoints", "RESOURCE_EXHAUSTED", code="unwritable"):
        train(experiment(root, tmp_path))


def test_what_is_damaged_in_a_work_directory_is_named(root, tmp_path, whole):
    shutil.copytree(whole[0].directory, tmp_path / "run")
    config = dataclasses.replace(whole[0], workdir=tmp_path / "run")
    newest = step_directory(config.directory)
    for file in newest.parent.glob("*/metadata/*"):  # of one alone, the run would go on from the step before
        if file.is_file():
            file.write_text("{")
    with raises(CheckpointError, "checkpoint", newest, code="damaged"):
        train(config)
    (config.directory / "config.json").write_text('{"name": ')
    with raises(CheckpointError, "config.json", config.directory / "config.json", code="unreadable"):
        train(config)


def test_a_malformed_row_is_named_by_file_and_line(root, tmp_path):
    rows = write_rows(tmp_path / "mine.jsonl", color_rows()[:3])
    rows.write_text(rows.read_text() + '{"system": "x", "input": "y"\n')
    config = replace(experiment(root, tmp_path / "run"), "data", files=(rows,))
    with raises(DataError, "mine.jsonl:4", f"{rows}:4", code="json"):
        train(config)
    assert not config.directory.exists()


def test_a_tokenizer_larger_than_the_embedding_is_refused_and_a_smaller_one_is_fine(root, tmp_path):
    write_model(tmp_path / "big", filler=40)
    config = dataclasses.replace(experiment(root, tmp_path / "run"), edge=ModelConfig(str(tmp_path / "big")))
    with raises(ModelError, "tokenizer", 72):
        train(config)
    assert not config.directory.exists()
    encoder = load_pair(experiment(root, tmp_path / "run")).edge.encoder
    assert len(encoder.tokenizer) < encoder.vocab_size == 72


@pytest.mark.parametrize(("steps", "traced"), [(1, (1, 1)), (3, (3, 3)), (5, (5, 5)), (6, (5, 6)), (12, (5, 8))])
def test_profiling_traces_steps_5_to_8_or_the_last_of_a_shorter_run(tmp_path, monkeypatch, steps, traced):
    """The loop alone, with steps that compute nothing."""
    run, calls = profiled_run(tmp_path, monkeypatch, steps, fails_at=None)
    loop.loop(run, StopSignals())
    assert calls == [("start", traced[0]), ("stop", traced[1])]


def test_a_step_that_fails_leaves_no_trace_open(tmp_path, monkeypatch):
    run, calls = profiled_run(tmp_path, monkeypatch, 12, fails_at=6)
    with pytest.raises(FloatingPointError):
        loop.loop(run, StopSignals())
    assert calls == [("start", 5), ("stop", 5)]


def profiled_run(tmp_path, monkeypatch, steps, fails_at):
    config = experiment(tmp_path, tmp_path / "run", steps=steps, warmup_steps=0, profile=True)
    config.directory.mkdir(parents=True)
    done, calls = [], []

    def step(state, frozen, batch):
        if len(done) + 1 == fails_at:
            raise FloatingPointError
        done.append(1)
        return state, {"loss": jnp.ones(()), "grad_norm": jnp.ones(())}

    monkeypatch.setattr(jax.profiler, "start_trace", lambda path: calls.append(("start", len(done) + 1)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append(("stop", len(done))))
    monkeypatch.setattr(loop, "_tokens", lambda batch, prompts: 1)
    state = TrainState(jnp.zeros((), jnp.int32), {}, {}, {})
    quiet = SimpleNamespace(save=lambda *args: None, check=lambda: None, wait=lambda: None, directory=tmp_path)
    model = SimpleNamespace(decoder=SimpleNamespace(dtype=jnp.float32, operands=None), weights=None)
    pair = SimpleNamespace(frozen=None, fingerprints={}, cloud=model, edge=model)
    fields = {
        "config": config,
        "pair": pair,
        "contents": {},
        "mesh": None,
        "state": state,
        "train_step": step,
        "validate": None,
    }
    run = loop.Run(**fields, batches=_Endless(), held_out=[], checkpoints=quiet, bucket_owner=BucketOwner(config))
    monkeypatch.setattr(loop.Run, "place", lambda self, batch: batch)
    return run, calls


class _Endless:
    def __next__(self):
        return None

    def get_state(self):
        return {}


def test_a_directory_without_a_checkpoint_is_named(tmp_path):
    with raises(CheckpointError, "--checkpoint", tmp_path, code="none"):
        load_checkpoint(tmp_path)


def test_a_damaged_checkpoint_is_named(tmp_path):
    copy = tmp_path / "24"
    shutil.copytree(step_directory(trained().directory), copy)
    for path in (copy / "generator").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with raises(CheckpointError, "--checkpoint", copy, code="damaged"):
        load_checkpoint(copy)


def test_newest_checkpoints_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    state = TrainState(jnp.asarray(0), {"w": jnp.ones(2)}, {"s": jnp.ones(2)}, {"m": jnp.ones(2)})

    # Validation losses; None where the step was not validated. The best is step 2.
    def save(*validations):
        for step, validated in validations:
            checkpoints.save(state.replace(step=jnp.asarray(step)), {"at": step}, {"fingerprints": {}}, validated)
        checkpoints.close()
        return sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())

    assert save((1, 3.0), (2, 1.0), (3, None), (4, 2.0), (5, None)) == [2, 4, 5]
    # The next process knows it, too, until there is a better one.
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    assert checkpoints.latest == 5
    assert save((6, 1.5), (7, None), (8, None)) == [2, 7, 8]
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    assert save((9, 0.5), (10, None), (11, None), (12, None)) == [9, 11, 12]


def test_a_run_that_begins_again_without_a_checkpoint_notes_every_step_once(tmp_path):
    for start, steps in ((0, (0, 1, 2)), (0, (0, 1, 2, 3)), (2, (3,))):
        with Recorder(tmp_path, start, 5) as recorder:
            for step in steps:
                recorder.record(step, {"validation_loss": float(step)})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
