"""Generators on the Hugging Face hub: published with a card, fetched by name, and what is said where that fails.

The hub is `hub_server`, on loopback. Commands run in processes of their own: its client reads HF_ENDPOINT once.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from before_jax import COMPILE_QUICKLY
from helpers import experiment, generator_variables, raises, unsaid
from hub_server import TOKEN, Repository, hub_server

from lora_gen_jax import hub as hub_module
from lora_gen_jax.errors import CheckpointError, ConfigError
from lora_gen_jax.generator.cloud import pack_prompts
from lora_gen_jax.methods.registry import make_generator
from lora_gen_jax.models import load_pair
from lora_gen_jax.pack_command import Pack, pack_command
from lora_gen_jax.specializer import Specializer, find_generator
from lora_gen_jax.training import published
from lora_gen_jax.training.checkpoint import Loaded, find_checkpoint, load_checkpoint, versions
from lora_gen_jax.training.portable import READABLE, TENSORS, save_portable
from lora_gen_jax.untrusted import digest_of

PROMPT = "say the color of the sun"
COMMANDS = """
import contextlib, io, json, sys
from lora_gen_jax.cli import main
for args in json.load(sys.stdin):
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(args)
        except SystemExit as stop:
            status = stop.code
    print(json.dumps([status, out.getvalue(), err.getvalue()]))
"""


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A tiny generator as `pack` leaves it."""
    root = tmp_path_factory.mktemp("generator")
    config = experiment(root, root / "run")
    pair = load_pair(config)
    generator = make_generator(config, pair)
    prompts = pack_prompts([pair.cloud.encoder.prompt(PROMPT)], 2, 1, 32)
    variables = generator_variables(generator, pair.cloud.params, prompts)
    save_portable(Loaded(3, variables, config, pair.fingerprints, versions(), root), root / "packed", np.float32)
    return root / "packed"


@pytest.fixture(scope="module")
def hub(packed):
    files = {name: (packed / name).read_bytes() for name in (TENSORS, READABLE)}
    unsealed = {name: value for name, value in json.loads(files[READABLE]).items() if name != "sha256"}
    with hub_server() as server:
        for name, changed in (
            ("org/gated", {}),
            ("org/damaged", {TENSORS: files[TENSORS][:-4] + bytes(4)}),
            ("org/unsealed", {READABLE: json.dumps(unsealed).encode()}),
        ):
            server.repositories[name] = Repository(gated=name == "org/gated")
            server.repositories[name].commit(files | changed)
        server.repositories["org/model"] = Repository()
        server.repositories["org/model"].commit({"config.json": b"{}", "model.safetensors": b"x"})
        yield server


def run(hub, home, commands, **variables):
    """What commands end with: (status, standard output, standard error) of each."""
    # A request to any other machine would go to a proxy that is not there.
    nowhere = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:9")
    environment = {
        **{name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")},
        **COMPILE_QUICKLY,
        **nowhere,
        "NO_PROXY": "127.0.0.1",
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home / "hub"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",  # the server speaks LFS
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(Path(__file__).parents[1]),
        **variables,
    }
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS],
        input=json.dumps([[str(x) for x in command] for command in commands]),
        capture_output=True,
        text=True,
        env=environment,
        cwd=home,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_generator_is_published_fetched_by_its_name_and_found_again(hub, packed, tmp_path):
    (tmp_path / "org").mkdir()
    shutil.copytree(packed, tmp_path / "org" / "local")
    wrong = {
        "org/absent": ["`hf auth login`"],
        "org/gated": ["`hf auth login`"],
        "org/model": [TENSORS, READABLE, "`lora-gen pack --publish`"],
        "org/unsealed": ["sha256"],
        "org/damaged": [TENSORS, "SHA-256"],
        "org/young@v9": ["v9"],
    }
    publish = ("pack", "--checkpoint", packed, "--dtype", "float32", "--publish")
    commands = [
        (*publish, "org/young", "--license", "cc-by-sa-4.0", "--private"),
        ("specialize", "--checkpoint", "org/young", "--prompt", PROMPT, "--out", "special"),
        (*publish, "org/young", "--out", "kept"),
        (*publish, "others/young"),
        ("pack", "--checkpoint", "org/local", "--out", "of-local"),
        *(("pack", "--checkpoint", name, "--out", "never") for name in wrong),
    ]
    told = run(hub, tmp_path, commands, HF_TOKEN=TOKEN)
    first, made, second, forbidden, local, *failed = told

    assert [one[0] for one in (first, made, second, local)] == [0, 0, 0, 0], told
    repository = hub.repositories["org/young"]
    assert repository.private
    old, new = repository.commits
    assert first[1].strip() == f"{hub.url}/org/young/commit/{old}"
    assert second[1].strip() == f"{hub.url}/org/young/commit/{new}"
    assert set(repository.commits[new]) == {TENSORS, READABLE, "README.md"}
    assert (tmp_path / "kept" / TENSORS).read_bytes() == repository.commits[new][TENSORS]
    assert "org/local" not in " ".join(path for _, path, _ in hub.asked)
    check_card(repository.commits[old]["README.md"].decode(), "cc-by-sa-4.0", repository.commits[old][TENSORS])
    check_card(repository.commits[new]["README.md"].decode(), "unknown", repository.commits[new][TENSORS])

    assert forbidden[0] == 2
    assert unsaid(forbidden[2], ["others/young", "HF_TOKEN"]) == []
    for (status, out, err), (name, facts) in zip(failed, wrong.items(), strict=True):
        assert (status, out) == (2, ""), name
        assert unsaid(err, [name.partition("@")[0], *facts]) == [], err
    assert not (tmp_path / "never").exists()

    # The name and the commit are recorded: without a network the same is found in the cache, and nothing is asked.
    assert json.loads((tmp_path / "special" / "specialization.json").read_text())["checkpoint"] == f"org/young@{old}"
    asked = len(hub.asked)
    offline = [
        ("generate", "--specialization", "special", "--input", "what color is the sun ?", "--max-new-tokens", "2"),
        ("pack", "--checkpoint", f"org/young@{old}", "--out", "again", "--dtype", "float32"),
        ("pack", "--checkpoint", "org/never-seen", "--out", "never"),
        (*publish, "org/young"),
    ]
    answered, again, unseen, unpublished = run(hub, tmp_path, offline, HF_HUB_OFFLINE="1", HF_TOKEN=TOKEN)
    assert answered[0] == again[0] == 0, (answered, again)
    assert answered[1].strip()
    assert (tmp_path / "again" / TENSORS).read_bytes() == (packed / TENSORS).read_bytes()
    for (status, _, err), name in ((unseen, "org/never-seen"), (unpublished, "org/young")):
        assert status == 2
        assert unsaid(err, [name, "HF_HUB_OFFLINE"]) == [], err
    assert len(hub.asked) == asked
    assert all(known for _, path, known in hub.asked if not path.startswith("/lfs"))  # the token that HF_TOKEN names


def check_card(card, license_id, tensors):
    _, head, text = card.split("---\n", 2)
    metadata = yaml.safe_load(head)
    assert metadata["license"] == license_id
    assert metadata["library_name"] == "lora_gen_jax"
    assert "lora-gen" in metadata["tags"]
    assert "base_model" not in metadata  # a directory of this machine is nobody's base model
    assert "lora-gen specialize --checkpoint org/young" in text
    assert f"`{digest_of(tensors)}`" in text
    assert unsaid(text, ["4 experts of rank 4", "3 of 8 prompts"]) == []


def test_a_card_names_the_models_that_the_hub_has(packed):
    loaded = load_checkpoint(packed)

    def base_model(edge, cloud):
        models = {
            name: dataclasses.replace(loaded.config.edge, source=source)
            for name, source in (("edge", edge), ("cloud", cloud))
        }
        one = dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, **models))
        return yaml.safe_load(published.model_card(packed, "org/young", one, "mit").split("---\n")[1]).get("base_model")

    assert base_model("smollm2-135m", "smollm2-135m") == ["HuggingFaceTB/SmolLM2-135M-Instruct"]
    assert base_model("org/edge@v1", "org/cloud") == ["org/edge", "org/cloud"]
    assert base_model("pocket-edge", "/models/cloud") is None


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        ({}, "--out"),
        ({"publish": "young"}, "--publish"),
        ({"publish": "org/young@v1"}, "--publish"),
        ({"publish": "org/young"}, "--publish"),
        ({"out": Path("x"), "license": "mit"}, "--license"),
        ({"out": Path("x"), "private": True}, "--private"),
    ],
)
def test_what_pack_cannot_do_is_said_before_anything_is_read(monkeypatch, flags, field):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with raises(ConfigError, field):
        pack_command(Pack(Path("no/where"), **flags))


def test_a_config_asks_nobody_for_its_own_run(packed, tmp_path, monkeypatch):
    """runs/NAME, the default, would be a name on the hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(published, "download", None)
    config = dataclasses.replace(load_checkpoint(packed).config, workdir=Path("runs/tiny"))
    with raises(CheckpointError, "--checkpoint", tmp_path / "runs/tiny", code="none"):
        find_checkpoint(config)


def test_a_name_that_a_specialization_records_is_looked_up_in_the_cache_or_on_request(packed, monkeypatch):
    asked = []

    def download(name, what, files, cached=False):
        asked.append((name, cached))
        if cached:
            raise CheckpointError("it is not there")
        return packed

    monkeypatch.setattr(published, "download", download)
    (made,) = Specializer.load(packed).specialize([PROMPT])
    made = dataclasses.replace(made, checkpoint="org/young@" + "0" * 40)
    with raises(CheckpointError, "--checkpoint", "org/young@" + "0" * 40, "--trust-recorded"):
        find_generator(made, None)
    assert asked == [("org/young@" + "0" * 40, True)]
    found = find_generator(made, None, follow_remote=True)
    jax.tree.map(np.testing.assert_array_equal, found.variables, load_checkpoint(packed).variables)
    assert asked[1:] == [("org/young@" + "0" * 40, False)]


def test_the_caches_directories_have_names():
    directory = Path("/home/x/hub/models--an-org--a--name/snapshots") / ("a" * 40)
    assert hub_module.name_of(directory) == "an-org/a--name@" + "a" * 40
    assert hub_module.name_of("/runs/models--x/snapshots/1") is None
