"""Shared tiny models: decoders with random weights, generators with B away from zero, and an experiment on disk.

Everything here is small enough to compile in a second or two; nothing is downloaded.
"""

import atexit
import dataclasses
import functools
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_gen_jax.config import Config, DataConfig, EvalConfig, GeneratorConfig, ModelConfig, TrainConfig
from lora_gen_jax.decoder.config import DecoderConfig
from lora_gen_jax.decoder.model import Decoder
from lora_gen_jax.errors import LoraGenError
from lora_gen_jax.generator.cloud import PackedPrompts, pack_prompts

EDGE = DecoderConfig(
    family="llama",
    vocab_size=53,
    num_layers=3,
    width=16,
    ffn_width=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    max_positions=64,
    attention_scale=0.5,
    tied_embeddings=True,
)
# Another depth and width than the edge model, so that a mix-up of the two shows.
CLOUD = dataclasses.replace(EDGE, num_layers=2, width=20, ffn_width=28, num_heads=5, num_kv_heads=5)
OPT = dataclasses.replace(
    EDGE,
    family="opt",
    num_kv_heads=4,
    norm="layer",
    activation="relu",
    gated_ffn=False,
    qkv_bias=True,
    out_bias=True,
    ffn_bias=True,
    rope_theta=None,
    learned_position_offset=2,
)
SETTINGS = GeneratorConfig(
    num_experts=4, top_k=2, rank=3, alpha=6.0, dropout=0.0, cloud_rank=2, cloud_alpha=4.0, direct_width=8
)

SAME = {"rtol": 1e-9, "atol": 1e-9}
"""How close two programs for one function are in float64 (`float64` in conftest.py).

It rounds at 1.1e-16. A sum of n ≤ 1,000 products is off by at most n times that, 1e-13; twenty or so sums one after
another make 2e-12, and what follows them (a norm over 16 numbers, a softmax) enlarges it a hundredfold at most. What a
mistake changes is of the order of the numbers themselves: 1e-2 and more.
"""


@contextmanager
def raises(
    kind: type[LoraGenError], field: str | None, *facts: object, code: str | None = None
) -> Iterator[pytest.ExceptionInfo[Any]]:
    """The block ends in an error of exactly this kind, about this field, that says the facts.

    Args:
        kind, field, code: of the error; without a code any will do.
        facts: values, paths and names that its message must hold. Never words of a sentence, which may be improved.
    """
    with pytest.raises(kind) as found:
        yield found
    error = found.value
    assert type(error) is kind
    assert error.field == field, f"{error.field}: {error}"
    assert code in (None, error.code), f"{error.code}: {error}"
    assert error.problem.strip()
    assert error.remedy is None or error.remedy.strip()
    assert unsaid(str(error), facts) == [], str(error)


def unsaid(text: str, facts: Iterable[object]) -> list[object]:
    """The facts that a text does not hold. "5" is not said by "15" or "0.5"."""
    patterns = {fact: rf"(?<![\w.]){re.escape(str(fact))}(?!\.?\w)" for fact in facts}
    return [fact for fact, pattern in patterns.items() if not re.search(pattern, text)]


def refused(capsys: pytest.CaptureFixture[str], command: Callable[[list[str]], Any], args: Any, *facts: object) -> str:
    """A command ends with status 2, nothing on standard output, and one error on standard error that says the facts.

    Args:
        capsys, command, args: what is run, and how.
        facts: as of `raises`: a flag's or a field's name, values, paths.

    Returns:
        what it said. Of flags that are not known the parser draws a box.
    """
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        command([str(a) for a in args])
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    if isinstance(stop.value.__context__, LoraGenError):
        assert sum(line.startswith("error: ") for line in err.splitlines()) == 1, err
    assert unsaid(" ".join(err.replace("│", " ").split()), facts) == [], err
    return err


def noise_like(tree: Any, seed: int) -> Any:
    """Standard normal noise in the tree's shapes and types."""
    return jax.device_put(_noise(tree, seed))


def _noise(tree: Any, seed: int) -> Any:
    """The same in NumPy, which compiles nothing for each shape; nor does `device_put`, as `jnp.asarray` does."""
    leaves, treedef = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(treedef, [rng.standard_normal(x.shape, np.float32).astype(x.dtype) for x in leaves])


def filled(shapes: Any, seed: int) -> Any:
    """Parameters of these shapes, large enough for everything to matter: LoRA's B, biases and norms included."""

    def scaled(path: Any, x: np.ndarray) -> np.ndarray:
        name, factor = str(path[-1].key), 0.15
        if name != "scale" and x.ndim > 1 and not name.endswith(("embedding", "_b")):
            factor = x.shape[-2] ** -0.5
        x = x * x.dtype.type(factor)
        return x + x.dtype.type(1) if name == "scale" else x

    return jax.device_put(jax.tree_util.tree_map_with_path(scaled, _noise(shapes, seed)))


def random_params(config: DecoderConfig, seed: int = 0) -> Any:
    """Decoder weights; made without compiling the initializers."""
    shapes = jax.eval_shape(lambda key: Decoder(config).init(key, jnp.zeros((1, 2), jnp.int32)), jax.random.key(0))
    return filled(nn.unbox(shapes)["params"], seed)


@jax.jit(static_argnums=0)
def logits(decoder: Decoder, params: Any, tokens_BT: Any, positions_BT: Any = None, **kwargs: Any) -> jax.Array:
    """Logits [B, T, V] of one forward pass."""
    hidden, _ = decoder.apply({"params": params}, tokens_BT, positions_BT, **kwargs)
    return decoder.apply({"params": params}, hidden, method="logits")


def exact_logits(decoder: Decoder, params: Any, tokens_BT: Any) -> tuple[np.ndarray, float]:
    """Logits in float64, and how far another library's in float32 may be from them.

    That is four times as far as ours in float32 are. Who sums in another order rounds as often, so that the largest of
    thousands of errors is of the same size; a mistake changes logits by hundreds of times as much.
    """
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        exact = np.asarray(logits(decoder, jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params), tokens_BT))
    assert exact.dtype == np.float64
    rounding = float(np.abs(np.asarray(logits(decoder, params, tokens_BT)) - exact).max())
    assert 0 < rounding < 1e-4 * np.abs(exact).max()
    return exact, 4 * rounding


def padded(rows: list[list[int]], length: int, side: str = "right") -> tuple[np.ndarray, np.ndarray]:
    """(tokens, positions), each [B, T]; padding at position -1."""
    tokens = np.zeros((len(rows), length), np.int32)
    positions = np.full((len(rows), length), -1, np.int32)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        tokens[i, place], positions[i, place] = row, np.arange(len(row))
    return tokens, positions


def token_rows(lengths: list[int], vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Random token ids, never 0 or 1 (the padding of some families)."""
    rng = np.random.default_rng(seed)
    return [rng.integers(2, vocab_size, n).tolist() for n in lengths]


def prompts_of(lengths: list[int], rows: int, length: int, num_meta: int = EDGE.num_layers) -> PackedPrompts:
    """Random prompts for the cloud model, packed."""
    return pack_prompts(token_rows(lengths, CLOUD.vocab_size, seed=1), num_meta, rows, length)


def generator_variables(generator: nn.Module, frozen_cloud: Any, prompts: PackedPrompts, seed: int = 0) -> Any:
    """Variables with B away from zero: at B = 0 the gradients of A, gates and router are exactly zero."""
    keys = dict(zip(("params", "dropout", "gumbel"), jax.random.split(jax.random.key(seed), 3), strict=True))
    shapes = jax.eval_shape(generator.init, keys, frozen_cloud, prompts)
    stats = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes.get("batch_stats", {}))
    return {"params": filled(shapes["params"], seed)} | ({"batch_stats": stats} if stats else {})


_TEXT = """
    red green blue sun moon star cat dog bird fish apple pear stone water is are was color of the a an what which
    answer question kind say name one two three four five six yes no maybe hot cold big small fast slow tree
"""
WORDS = _TEXT.split()


def write_tokenizer(directory: Path, extra: int = 0) -> int:
    """A word tokenizer over `WORDS` plus `extra` filler words; returns its number of ids."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import WordPiece
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    names = ["<unk>", "<s>", "</s>", ".", ",", ":", "?", *WORDS, *(f"filler{i}" for i in range(extra))]
    tokenizer = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.decoder = WordPiece(prefix="##", cleanup=False)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "bos_token": "<s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(names)


def write_model(directory: Path, seed: int = 0, layers: int = 2, vocab_size: int = 72, filler: int = 0) -> Path:
    """A random llama with its tokenizer, as `save_pretrained` would leave it; the embedding has padding rows."""
    from safetensors.numpy import save_file

    from lora_gen_jax.decoder.pretrained import leaves

    directory.mkdir(parents=True)
    write_tokenizer(directory, filler)
    hf = {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 160,
        "tie_word_embeddings": True,
    }
    (directory / "config.json").write_text(json.dumps(hf))
    rng, tensors = np.random.default_rng(seed), {}
    for leaf in leaves(DecoderConfig.from_hf(hf)):
        for name in leaf.tensor_names(layers):
            noise = rng.standard_normal(leaf.stored_shape).astype(np.float32)
            tensors[name] = 1 + 0.1 * noise if "norm" in name else 0.15 * noise
    save_file(tensors, directory / "model.safetensors")
    return directory


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def color_rows() -> list[dict[str, Any]]:
    """Two learnable tasks of a user's own: each always gives the same answer to its questions."""
    things = ["sun", "moon", "star", "cat", "dog", "bird", "fish", "apple", "pear", "stone"]
    rows = []
    for task, system, answers in (
        ("warm", "say the color of the sun", ("red", "green", "blue")),
        ("count", "say one two three", ("two", "one", "three")),
    ):
        for i, thing in enumerate(things):
            row = {"task": task, "system": system, "input": f"what kind is the {thing} ?", "output": answers[0]}
            split = "train" if i < 7 else "validation" if i < 8 else "test"
            options = {"options": list(answers), "gold": 0} if split == "test" else {}
            rows.append({**row, **options, "split": split})
    return rows


def experiment(root: Path, workdir: Path, **train: Any) -> Config:
    """A config on a model and rows that are written below `root` at the first call; trains in seconds."""
    if not (root / "model").exists():
        write_model(root / "model")
        write_rows(root / "rows.jsonl", color_rows())
    model = ModelConfig(str(root / "model"), dtype="float32")
    settings = {
        "steps": 6,
        "learning_rate": 1e-2,
        "warmup_steps": 1,
        "validation_batches": 1,
        "validate_every": 3,
        "checkpoint_every": 3,
    }
    return Config(
        name="tiny",
        cloud=model,
        edge=model,
        generator=GeneratorConfig(num_experts=4, top_k=2, rank=4, cloud_rank=4, cloud_alpha=4.0, dropout=0.05),
        data=DataConfig(
            files=(root / "rows.jsonl",),
            tasks=(),
            prompts_per_step=8,
            prompts_per_row=2,
            cloud_length=96,
            edge_length=48,
            queries_per_prompt=4,
            response_slots=16,
            max_shots=2,
            query_length=24,
        ),
        train=TrainConfig(**(settings | train)),
        eval=EvalConfig(tasks=("warm", "count"), shots=2, prompt_limit=128),
        workdir=workdir,
    )


@functools.cache
def trained() -> Config:
    """The config of a finished run of 24 steps, made once for all test files; leave its directory as it is."""
    from lora_gen_jax.training.loop import train

    directory = tempfile.TemporaryDirectory(prefix="lora_gen_test")
    atexit.register(directory.cleanup)
    root = Path(directory.name)
    config = experiment(root, root / "run", steps=24, validate_every=12, checkpoint_every=12)
    # Whichever file asks first: all get the same.
    with jax.enable_x64(False):
        train(config)
    return config


def write_config(path: Path, config: Config) -> Path:
    """A config file whose ``get_config()`` returns this config."""
    text = (
        "import json\nfrom lora_gen_jax.config_file import from_json, to_json\n\n\n"
        f"def get_config():\n    return from_json(json.loads({json.dumps(json.dumps(_jsonable(config)))}))\n"
    )
    path.write_text(text, encoding="utf-8")
    return path


def _jsonable(config: Config) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))
