"""The flags of ``serve``: mistakes are told before anything is loaded, and the start fills the registry."""

import dataclasses
import gc
import importlib.util
import json
import shutil

import numpy as np
import pytest
from helpers import raises
from safetensors.numpy import save_file

from lora_gen_jax.adapters.specialization import save_specialization
from lora_gen_jax.errors import CheckpointError, ConfigError, DataError, OutputError
from lora_gen_jax.serving.command import Serve, _api_key, _specializer, read_registry, serve_command
from lora_gen_jax.serving.errors import ApiError
from lora_gen_jax.training import checkpoint


@pytest.mark.parametrize(
    ("flags", "field", "fact"),
    [
        ({"port": 65536}, "--port", 65536),
        ({"port": -1}, "--port", -1),
        ({"rows": 0}, "--rows", 0),
        ({"max_body_kb": -5}, "--max-body-kb", -5),
        ({"timeout": float("nan")}, "--timeout", "nan"),
        ({"shutdown_timeout": float("inf")}, "--shutdown-timeout", "inf"),
        ({"api_key": "two words"}, "--api-key", "ASCII"),
        ({"host": "no such host"}, "--host", "no such host"),
    ],
)
def test_a_flag_outside_its_range_is_named(flags, field, fact):
    with raises(ConfigError, field, fact):
        serve_command(Serve(**flags))


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else object())
    with raises(ConfigError, "uvicorn", "pip install 'lora_gen_jax[serve]'"):
        serve_command(Serve())


def test_the_key_comes_from_the_flag_a_file_or_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("LORA_GEN_API_KEY", raising=False)
    assert _api_key(Serve()) is None
    monkeypatch.setenv("LORA_GEN_API_KEY", "outer")
    assert _api_key(Serve()) == "outer"
    (tmp_path / "key").write_text("inner\n")
    assert _api_key(Serve(api_key=f"@{tmp_path / 'key'}")) == "inner"
    with raises(DataError, "--api-key", "--api-key", code="empty"):
        _api_key(Serve(api_key=""))


def test_a_generator_without_gates_is_not_served(generator_directory, tmp_path):
    shutil.copytree(generator_directory, tmp_path / "direct")
    readable = json.loads((generator_directory / "generator.json").read_text())
    readable["config"]["generator"]["generator"] = "direct"
    del readable["sha256"]  # as older versions wrote it
    (tmp_path / "direct" / "generator.json").write_text(json.dumps(readable))
    tensors = {"params/direct/hidden/bias": np.zeros(4, np.float32)}
    save_file(tensors, tmp_path / "direct" / "generator.safetensors")
    with raises(CheckpointError, "--checkpoint", "direct generation", "--format merged", code="method"):
        serve_command(Serve(checkpoint=tmp_path / "direct", port=0))


def test_the_generator_is_read_once(generator_directory, monkeypatch):
    read, load = [], checkpoint.load_portable
    monkeypatch.setattr(checkpoint, "load_portable", lambda path: read.append(path) or load(path))
    _specializer(Serve(checkpoint=generator_directory))
    assert read == [generator_directory]


def test_the_registry_holds_what_flags_and_store_name(specializer, made, tmp_path):
    save_specialization(made["red"], tmp_path / "given")
    store = tmp_path / "new" / "store"
    flags = Serve(specializations=(tmp_path / "given",), store=store)
    assert [entry.name for entry in read_registry(flags, specializer).entries] == ["given"]
    save_specialization(made["two"], store / "kept")
    registry = read_registry(flags, specializer)
    assert [entry.name for entry in registry.entries] == ["given", "kept"]
    assert registry.directory("kept") == store / "kept"
    # Where both have a name, the store's is the newer one; and what is kept is served whatever the limit.
    save_specialization(made["two"], store / "given")
    full = read_registry(dataclasses.replace(flags, max_specializations=1), specializer)
    assert [entry.name for entry in full.entries] == ["given", "kept"]
    assert (full.entries[0].gates.dense() == full.entries[1].gates.dense()).all()
    with raises(ApiError, None, 1, code="too_many_specializations"):
        full.reserve("more")
    save_specialization(made["red"], tmp_path / "other")
    two = Serve(specializations=(tmp_path / "given", tmp_path / "other"), max_specializations=1)
    with raises(CheckpointError, "--max-specializations", 2, 1):
        read_registry(two, specializer)
    with raises(ConfigError, "--store", "--specializations", code="specialization"):
        read_registry(Serve(store=store / "kept"), specializer)
    (tmp_path / "file").write_text("")
    with raises(OutputError, "--store", "--store", code="unusable"):
        read_registry(Serve(store=tmp_path / "file"), specializer)


def test_what_is_there_before_the_first_request_is_not_collected_again(generator_directory, monkeypatch):
    frozen = []

    def run(service, listener, *args):
        frozen.append(gc.get_freeze_count())
        service.close()
        assert service.scheduler.close(30)
        return 0

    monkeypatch.setattr("lora_gen_jax.serving.server.run_server", run)
    gc.unfreeze()  # what conftest.py has frozen
    serve_command(Serve(checkpoint=generator_directory, port=0, rows=1, context=32, warm_up=False))
    assert frozen[0] > 10_000


def test_more_rows_than_there_is_memory_for_are_refused(generator_directory):
    with raises(ConfigError, "rows", 10**9, code="memory"):
        serve_command(Serve(checkpoint=generator_directory, port=0, rows=10**9, warm_up=False))
