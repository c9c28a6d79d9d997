"""Specializations on disk: what a server reads at its start, and what it refuses to."""

import dataclasses
import errno
import logging
import os
from pathlib import Path

import numpy as np
import pytest
from helpers import raises, unsaid
from serving_tools import PROMPTS

from lora_gen_jax.adapters.specialization import load_specialization, save_specialization
from lora_gen_jax.errors import CheckpointError
from lora_gen_jax.serving.registry import Served
from lora_gen_jax.serving.stored import read_entries, read_store, remove_directory


def test_directories_of_specializations_are_read(specializer, made, tmp_path):
    served = Served.of(specializer)
    for name, specialization in made.items():
        save_specialization(specialization, tmp_path / "many" / name)
    (tmp_path / "many" / ".cat.half-written").mkdir()
    save_specialization(made["red"], tmp_path / "single")
    entries = read_entries([tmp_path / "single", tmp_path / "many"], served)
    assert sorted(entry.name for entry in entries) == ["cat", "red", "single", "two"]
    assert {len(entry.gates.dense()) for entry in entries} == {2}
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


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def fingerprint_flipped(part):
    def damage(directory):
        path = directory / "specialization.safetensors"
        data = path.read_bytes()
        flip(path, data.index(f'"{part}":"'.encode()) + len(part) + 5)

    return damage


DAMAGES = {
    "cut": lambda directory: os.truncate(directory / "specialization.safetensors", 60),
    "gates": lambda directory: flip(
        directory / "specialization.safetensors", -5
    ),  # behind it is the index, 2 × 2 × 1 byte
    "header": lambda directory: flip(directory / "specialization.safetensors", 8),
    "pool": fingerprint_flipped("pool"),
    "edge": fingerprint_flipped("edge"),
    "prompt": lambda directory: flip(directory / "prompt.txt", 0),
    "readable": lambda directory: (directory / "specialization.json").write_bytes(b"{"),
    "empty": lambda directory: (directory / "specialization.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_of_a_store_is_set_aside_and_the_others_are_served(specializer, made, tmp_path, caplog, damage):
    for name in ("red", "two"):
        save_specialization(made[name], tmp_path / name)
    DAMAGES[damage](tmp_path / "red")
    served = Served.of(specializer)
    with caplog.at_level(logging.WARNING, "lora_gen_jax"):
        assert [entry.name for entry in read_store(tmp_path, served)] == ["two"]
    (record,) = caplog.records
    (aside,) = (path.name for path in tmp_path.iterdir() if path.name != "two")
    assert aside.startswith(".red.damaged-")
    assert unsaid(record.getMessage(), [str(tmp_path / "red"), aside]) == []
    caplog.clear()
    save_specialization(made["red"], tmp_path / "red")  # the name is free
    assert [entry.name for entry in read_store(tmp_path, served)] == ["red", "two"]
    assert caplog.records == []


def test_a_store_of_another_generator_is_left_as_it_is(specializer, made, tmp_path):
    for part in ("pool", "edge"):
        other = dataclasses.replace(made["red"], fingerprints={**made["red"].fingerprints, part: "0" * 16})
        save_specialization(other, tmp_path / part / "red")
        with raises(CheckpointError, "specialization.safetensors:pool" if part == "pool" else "--edge"):
            read_store(tmp_path / part, Served.of(specializer))
        assert [path.name for path in (tmp_path / part).iterdir()] == ["red"]


def test_a_damaged_entry_that_cannot_be_set_aside_is_passed_over(specializer, made, tmp_path, monkeypatch, caplog):
    save_specialization(made["red"], tmp_path / "red")
    DAMAGES["cut"](tmp_path / "red")

    def read_only(self, target):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "rename", read_only)
    assert read_store(tmp_path, Served.of(specializer)) == []
    assert os.strerror(errno.EROFS) in caplog.text
