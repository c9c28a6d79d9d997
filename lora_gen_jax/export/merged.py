"""A specialized edge model, or the base model itself, as an ordinary Hugging Face model directory.

In: a model with what is merged into it. Out: config.json, safetensors, the tokenizer's files as the original has them,
generation_config.json and README.md.
"""

import dataclasses
import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lora_gen_jax.decoder.pretrained import load_hf_config, resolve
from lora_gen_jax.decoder.pretrained.save import save_config, save_weights
from lora_gen_jax.models import Model, end_ids

# Whatever a tokenizer of transformers may consist of; other files of the original say nothing about these weights.
_TOKENIZER_FILES = (
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates",
)
CARD = """---
base_model: {source}
library_name: transformers
pipeline_tag: text-generation
tags: [lora-gen]
---

# {title}

{text}

| made from | |
|---|---|
{origin}
"""


@dataclasses.dataclass(frozen=True)
class MergedModel:
    """What is written.

    Attributes:
        model: the weights with everything merged into them, and the tokenizer.
        source: of the original, as the user named it.
        origin: what the specialization was made from, by name; None for the base model as it is.
    """

    model: Model
    source: str
    origin: dict[str, str] | None


def write_merged(merged: MergedModel, directory: Path, dtype: Any, shard_bytes: int) -> None:
    """Writes the model into `directory`, which exists.

    Args:
        merged: the model.
        directory: where to write.
        dtype: that the weights are stored in; they are rounded to it once.
        shard_bytes: largest file of weights.

    Raises:
        ConfigError: for a weight beyond the dtype's range.
        ModelError: when the original's generation_config.json is damaged.
    """
    found = resolve(merged.source)
    save_config(directory, load_hf_config(found), dtype)
    write_generation_config(merged, directory)
    for pattern in _TOKENIZER_FILES:
        for path in found.tokenizer.glob(pattern):
            copy = shutil.copytree if path.is_dir() else shutil.copyfile
            copy(path, directory / path.name)
    save_weights(directory, merged.model.config, merged.model.params, dtype, shard_bytes)
    if merged.origin is None:
        title, text = f"{merged.source} as it is", "The edge model that specializations are applied to."
    else:
        title = f"A specialization of {merged.source}"
        text = "LoRA-Gen merged what a system prompt asks for into the weights. Give it the input alone."
    origin = merged.origin or {"edge model (fingerprint)": merged.model.fingerprint}
    rows = "\n".join(f"| {name} | {value} |" for name, value in origin.items())
    card = CARD.format(source=merged.source, title=title, text=text, origin=rows)
    (directory / "README.md").write_text(card, encoding="utf-8")


def write_generation_config(merged: MergedModel, directory: Path) -> None:
    """Writes generation_config.json: the original's, with ids that end, begin and pad a text.

    Raises:
        ModelError: when the original's is damaged.
    """
    model, tokenizer = merged.model, merged.model.encoder.tokenizer
    ends = end_ids(merged.source, model)
    path = resolve(merged.source).model / "generation_config.json"
    given = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id} | given
    # One id or a list of them, as transformers writes it.
    found["eos_token_id"] = list(ends) if len(ends) > 1 else next(iter(ends), None)
    found["transformers_version"] = version("transformers")
    written = {name: value for name, value in found.items() if value is not None}
    (directory / "generation_config.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
