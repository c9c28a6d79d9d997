"""Specialisations on disk: what a server reads at its start, and what it refuses to."""

import dataclasses
from pathlib import Path

import numpy as np
from helpers import raises
from serving_tools import PROMPTS

from lora_gen_jax.adapters.specialization import load_specialization, save_specialization
from lora_gen_jax.errors import CheckpointError
from lora_gen_jax.serving.registry import Served
from lora_gen_jax.serving.stored import read_entries, read_store, remove_directory


def test_directories_of_specialisations_are_read(specializer, made, tmp_path):
    served = Served.of(specializer)
    for name, specialization in made.items():
        save_specialization(specialization, tmp_path / "many" / name)
    (tmp_path / "many" / ".cat.half-written").mkdir()
    save_specialization(made["red"], tmp_path / "single")
    entries = read_entries([tmp_path / "single", tmp_path / "many"], served)
    assert sorted(entry.name for entry in entries) == ["cat", "red", "single", "two"]
    assert {len(entry.gates_LE) for entry in entries} == {2}
    with raises(CheckpointError, "name", tmp_path / "many" / "red", code="taken"):
        read_entries([tmp_path / "many", tmp_path / "many" / "red"], served)


def test_a_directory_that_cannot_be_served_is_named(specializer, made, tmp_path):
    served, good = Served.of(specializer), made["red"]
    for part, field in (("pool", "specialization.safetensors:pool"), ("edge", "--edge")):
        other = dataclasses.replace(good, fingerprints={**good.fingerprints, part: "0" * 16})
        save_specialization(other, tmp_path / part)
        with raises(CheckpointError, field, tmp_path / part):
            read_entries([tmp_path / part], served)
    save_specialization(good, tmp_path / "auto")
    with raises(CheckpointError, "name", tmp_path / "auto", code="invalid_name"):
        read_entries([tmp_path / "auto"], served)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "text").mkdir()
    for path, code in (("empty", "empty"), ("missing", "no directory")):
        with raises(CheckpointError, "--specializations", tmp_path / path, code=code):
            read_entries([tmp_path / path], served)
    with raises(CheckpointError, "specialization.safetensors", tmp_path / "notes" / "text"):
        read_entries([tmp_path / "notes"], served)
    with raises(CheckpointError, "layers", 2, 3):
        dataclasses.replace(served, fit=dataclasses.replace(served.fit, layers=3)).entry("x", good)


def test_more_gates_than_the_generator_makes_are_refused(specializer, made, tmp_path):
    index = np.tile(np.arange(3, dtype=np.uint8), (2, 1))
    tensors = {"index": index, "weight": np.full(index.shape, 1 / 3, np.float32)}
    save_specialization(dataclasses.replace(made["red"], tensors=tensors), tmp_path / "many")
    with raises(CheckpointError, "specialization.safetensors:index", tmp_path / "many", "3 gates", 2):
        read_entries([tmp_path / "many"], Served.of(specializer))


def test_a_link_is_served_by_its_own_name_and_removed_alone(specializer, made, tmp_path, monkeypatch):
    save_specialization(made["red"], tmp_path / "red")
    (tmp_path / "linked").symlink_to(tmp_path / "red")
    served = Served.of(specializer)
    assert [entry.name for entry in read_entries([tmp_path / "linked"], served)] == ["linked"]
    monkeypatch.chdir(tmp_path / "red")
    assert [entry.name for entry in read_entries([Path()], served)] == ["red"]
    remove_directory(tmp_path / "linked")
    assert [path.name for path in tmp_path.iterdir()] == ["red"]
    assert load_specialization(tmp_path / "red").prompt == PROMPTS["red"]


def test_a_store_passes_over_what_no_server_puts_there(specializer, made, tmp_path):
    served, store = Served.of(specializer), tmp_path / "new" / "store"
    assert read_store(store, served) == []
    for name in ("lost+found", "base", ".red.half-written", ".red.removed-7"):
        (store / name).mkdir()
    (store / "notes").write_text("plain")
    assert read_store(store, served) == []
    assert not (store / ".red.removed-7").exists()
    save_specialization(made["red"], store / "red")
    assert [entry.name for entry in read_store(store, served)] == ["red"]


def test_a_small_change_of_a_stored_file_is_noticed(specializer, made, tmp_path):
    save_specialization(made["red"], tmp_path / "red")
    assert load_specialization(tmp_path / "red").prompt == PROMPTS["red"]
    (tmp_path / "red" / "prompt.txt").write_text("say blue")
    with raises(CheckpointError, "prompt.txt:sha256", tmp_path / "red"):
        read_entries([tmp_path / "red"], Served.of(specializer))
