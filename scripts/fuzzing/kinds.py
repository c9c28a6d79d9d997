"""The kinds of files that are read: how good ones are made, what reading one gives, and how its author would seal it.

Everything is tiny: the pocket pair's shipped generator, a model of two layers, a checkpoint of two arrays.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from lora_gen_jax.adapters import specialization as special
from lora_gen_jax.adapters.specialization_fit import Fit, check_pool
from lora_gen_jax.config import Config, ModelConfig
from lora_gen_jax.data.load import load_tasks
from lora_gen_jax.data.prompt_sources import read_examples, read_prompts
from lora_gen_jax.decoder.config import DecoderConfig
from lora_gen_jax.decoder.pretrained import fingerprint, leaves, load_config, load_params, load_tokenizer
from lora_gen_jax.generator.router import gates_of
from lora_gen_jax.models import end_ids, load_model
from lora_gen_jax.training import portable
from lora_gen_jax.training.checkpoint import Loaded, check_models, load_checkpoint, metadata_of, sealed
from lora_gen_jax.training.optimizer import make_optimizer
from lora_gen_jax.training.prepare import prepare_directory
from lora_gen_jax.training.run_checkpoints import Checkpoints
from lora_gen_jax.training.step import TrainState
from lora_gen_jax.untrusted import digest_of, file_digest, flatten


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        name: of the row in the table.
        write: makes good files in a directory.
        damaged: the file below it that is damaged, and how: "bytes", "json", "jsonl" or "safetensors".
        read: reads the directory and says in a text what it found: the same text is the same result.
        seal: makes digests anew after an author's change; None where nothing has any.
        bound: damage by accident must not change the result.
    """

    name: str
    write: Callable[[Path], Any]
    damaged: dict[str, str]
    read: Callable[[Path], str]
    seal: Callable[[Path], Any] | None = None
    bound: bool = True


def digests(tree: Any) -> str:
    """One text for a tree of arrays."""
    return json.dumps({name: digest_of(value) for name, value in flatten(tree)}, sort_keys=True)


@functools.cache
def shipped() -> tuple[Loaded, DecoderConfig]:
    """The pocket pair's generator, and its edge model's config."""
    loaded = load_checkpoint(portable.SHIPPED["quickstart"])
    return loaded, load_config(loaded.config.edge.source)


def write_specialization(directory: Path) -> None:
    """Random gates of the shipped generator, with factors beside them."""
    loaded, edge = shipped()
    settings, rng = loaded.config.generator, np.random.default_rng(0)
    logits_LE = rng.standard_normal((edge.num_layers, settings.num_experts))
    gates = gates_of(jax.numpy.asarray(logits_LE), settings.routing, settings.top_k, settings.temperature)
    tensors = special.gate_tensors(jax.tree.map(np.asarray, gates), settings)
    for site, (inputs, outputs) in edge.ffn_shapes.items():
        for x, shape in (("a", (inputs, 2)), ("b", (2, outputs))):
            tensors[f"{site}.{x}"] = rng.standard_normal((edge.num_layers, *shape)).astype(np.float32)
    fit = Fit.of(loaded.variables, settings, edge.num_layers)
    refined = {"kind": "lora", "examples": 3, "steps": 4, "loss_before": 2.0, "loss_after": 1.0}
    made = special.Specialization(
        tensors, {**loaded.fingerprints, "pool": fit.pool}, "Answer.\n", None, {"jax": "1"}, refined
    )
    special.save_specialization(made, directory / "s")


def read_specialization(directory: Path) -> str:
    """As generating does, up to the adapter."""
    loaded, edge = shipped()
    found = special.load_specialization(directory / "s")
    Fit.of(loaded.variables, loaded.config.generator, edge.num_layers).check(found)
    gates_LE = found.gates(loaded.config.generator.num_experts).dense()
    return json.dumps([digest_of(gates_LE), digests(found.factors), found.prompt, found.fingerprints])


def seal_specialization(directory: Path) -> None:
    """The digest of its tensors."""
    _put(
        directory / "s" / special.READABLE,
        lambda old: {special.TENSORS: file_digest(directory / "s" / special.TENSORS)},
    )


def _put(path: Path, digest: Callable[[dict[str, Any]], Any]) -> None:
    """Replaces "sha256" of a JSON file, if it still holds an object."""
    try:
        values = json.loads(path.read_text())
    except (ValueError, RecursionError):
        return
    if isinstance(values, dict):
        values.pop("sha256", None)
        path.write_text(json.dumps(values | {"sha256": digest(values)}))


def write_generator(directory: Path) -> None:
    """The shipped one, packed again."""
    portable.save_portable(shipped()[0], directory / "g", np.float16)


def read_generator(directory: Path) -> str:
    """As generating does, up to its pool."""
    _, edge = shipped()
    loaded = load_checkpoint(directory / "g")
    settings = loaded.config.generator
    check_pool(loaded.variables, settings, edge, "generator")
    Fit.of(loaded.variables, settings, edge.num_layers)
    return json.dumps([digests(loaded.variables), str(loaded.config), loaded.step, loaded.fingerprints])


def seal_generator(directory: Path) -> None:
    """The digests of its two files."""
    tensors, readable = directory / "g" / portable.TENSORS, directory / "g" / portable.READABLE
    _put(readable, lambda old: {portable.TENSORS: file_digest(tensors), portable.READABLE: digest_of(old)})


def _state(optimizer: Any) -> TrainState:
    rng = np.random.default_rng(0)
    params = {"pool": {f"up_{x}": jnp.asarray(rng.standard_normal((4, 16, 8), np.float32)) for x in "ab"}}
    return TrainState(jnp.asarray(1, jnp.int32), params, {}, optimizer.init(params))


def write_checkpoint(directory: Path) -> None:
    """One step of a run."""
    config = Config(name="fuzz")
    optimizer = make_optimizer(config.train)
    run = Checkpoints(directory / "checkpoints", keep=1)
    metadata = metadata_of(config, {"cloud": "c", "edge": "e"}, {"rows": "r"}, 1)
    run.save(_state(optimizer), {"taken": 1}, metadata, None)
    run.close()


def read_checkpoint(directory: Path) -> str:
    """As `pack` and going on with the run do."""
    loaded = load_checkpoint(directory)
    optimizer = make_optimizer(Config().train)
    run = Checkpoints(directory / "checkpoints", keep=1)
    try:
        made_with = run.made_with()
        state, place = run.restore(jax.tree.map(jnp.zeros_like, _state(optimizer)))
    finally:
        run.close()
    arrays = [digest_of(x) for x in jax.tree.leaves(state)]
    return json.dumps([digests(loaded.variables), str(loaded.config), loaded.step, made_with, arrays, place])


def seal_checkpoint(directory: Path) -> None:
    """The digest of its metadata."""
    path = directory / "checkpoints" / "1" / "metadata" / "metadata"
    try:
        values = json.loads(path.read_text())
    except (ValueError, RecursionError):
        return
    if isinstance(values, dict):
        values.pop("sha256_of_this", None)
        path.write_text(json.dumps(sealed(values)))


LETTERS = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]  # GPT-2's alphabet
MODEL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "eos_token_id": 257,
}


def _tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        name: rng.standard_normal(leaf.stored_shape).astype(np.float32)
        for leaf in leaves(DecoderConfig.from_hf(MODEL))
        for name in leaf.tensor_names(MODEL["num_hidden_layers"])
    }


def write_gguf(directory: Path) -> None:
    """A llama with a byte-level BPE vocabulary."""
    writer = gguf.GGUFWriter(directory / "model.gguf", "llama")
    writer.add_block_count(MODEL["num_hidden_layers"])
    writer.add_context_length(MODEL["max_position_embeddings"])
    writer.add_embedding_length(MODEL["hidden_size"])
    writer.add_feed_forward_length(MODEL["intermediate_size"])
    writer.add_head_count(MODEL["num_attention_heads"])
    writer.add_head_count_kv(MODEL["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(MODEL["rms_norm_eps"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    tokens = [*LETTERS[:256], "<s>", "</s>", "ab", "abc"]
    tokens += [f"<{i}>" for i in range(MODEL["vocab_size"] - len(tokens))]
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<") and len(token) > 1 else 1 for token in tokens])
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, MODEL["num_hidden_layers"])
    for name, value in _tensors().items():
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None
        writer.add_tensor(stored, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf(directory: Path) -> str:
    """Config, parameters and tokenizer; then, as every user of a model does, its fingerprint is compared."""
    path, cache = directory / "model.gguf", directory.parent / "cache"
    os.environ["LORA_GEN_CACHE"] = str(cache)
    params = load_params(path)
    load_tokenizer(path)
    assert all({p.name for p in one.iterdir()} >= {"tokenizer.json"} for one in cache.glob("tokenizers/*"))
    _same_model("gguf", fingerprint(path))
    return digests(params)


_KNOWN: dict[str, str] = {}


def _same_model(name: str, found: str) -> None:
    """A model that is another says so: what was made for the first one refuses it."""
    expected = _KNOWN.setdefault(name, found)
    check_models({"cloud": expected, "edge": expected}, {"cloud": found, "edge": found}, "fuzz")


def write_model(directory: Path) -> None:
    """A llama as `save_pretrained` leaves it."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    model = directory / "m"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(MODEL))
    save_file(_tensors(), model / "model.safetensors")
    words = {f"w{i}": i for i in range(250)} | {"<unk>": 250, "</s>": 251}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    tokenizer.save(str(model / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "bos_token": "</s>"}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [251]}))


def read_model(directory: Path) -> str:
    """A model with its tokenizer, and its fingerprint compared."""
    source = str(directory / "m")
    model = load_model(ModelConfig(source, dtype="float32"))
    end_ids(source, model)
    _same_model("hf", model.fingerprint)
    return digests(model.params)


def write_run(directory: Path) -> None:
    """A work directory that training has begun."""
    prepare_directory(Config(name="fuzz", workdir=directory))


def read_run(directory: Path) -> str:
    """As the same command again does: with another config it is refused."""
    prepare_directory(Config(name="fuzz", workdir=directory))
    return "the same config"


def write_rows(directory: Path) -> None:
    """Rows of a task, solved examples, and prompts."""
    row = {"task": "t", "system": "say", "input": "who", "output": "me", "options": ["me", "you"], "gold": 0}
    rows = [row | {"input": f"who {i}", "split": split} for i in range(3) for split in ("train", "validation", "test")]
    examples = [{"input": f"one {i}", "output": "two"} for i in range(3)]
    prompts = [{"prompt": "Answer.", "name": "a"}, {"description": "d", "shots": examples, "name": "b"}]
    prompts.append({"messages": [{"role": "system", "content": "Be short."}], "name": "c"})
    for name, values in (("rows", rows), ("examples", examples), ("prompts", prompts)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))


def read_rows(directory: Path) -> str:
    """As training and `specialize` read them."""
    tasks = load_tasks((), files=[directory / "rows.jsonl"])
    return str([tasks, read_examples(directory / "examples.jsonl"), read_prompts(directory / "prompts.jsonl")])


CHECKPOINT = Kind(
    "checkpoint",
    write_checkpoint,
    {"checkpoints/1/**/*": "bytes", "checkpoints/1/metadata/metadata": "json"},
    read_checkpoint,
    seal_checkpoint,
)
KINDS = (
    Kind(
        "specialization",
        write_specialization,
        {"s/*.json": "json", "s/*.safetensors": "safetensors", "s/*.txt": "bytes"},
        read_specialization,
        seal_specialization,
    ),
    Kind(
        "generator",
        write_generator,
        {"g/*.json": "json", "g/*.safetensors": "safetensors"},
        read_generator,
        seal_generator,
    ),
    CHECKPOINT,
    Kind("GGUF model", write_gguf, {"model.gguf": "gguf"}, read_gguf),
    Kind("Hugging Face model", write_model, {"m/*.json": "json", "m/*.safetensors": "safetensors"}, read_model),
    Kind("config.json of a run", write_run, {"config.json": "json"}, read_run),
    # Text that was changed is other text: nothing says what it was.
    Kind("JSONL data", write_rows, {"*.jsonl": "jsonl"}, read_rows, bound=False),
)
