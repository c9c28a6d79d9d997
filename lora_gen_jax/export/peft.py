"""A specialization as a PEFT LoRA adapter, for transformers with peft, vLLM and others.

In: the factors of an adapter. Out: adapter_config.json, adapter_model.safetensors and README.md in a directory.
"""

import json
from pathlib import Path

import numpy as np

from lora_gen_jax.decoder.pretrained.save import cast, write_tensors
from lora_gen_jax.decoder.pretrained.sources import KNOWN_MODELS, PACKAGED_MODELS, resolve
from lora_gen_jax.export.factors import ExportedAdapter
from lora_gen_jax.export.formats import Format

CARD = """---
base_model: {source}
library_name: peft
pipeline_tag: text-generation
tags: [lora, lora-gen]
---

# A specialization of {source}

A LoRA of rank {rank} on {modules}, which LoRA-Gen made from a system prompt: the model with it answers as
if it had read that prompt. Give it the input alone.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

{base}
model = PeftModel.from_pretrained(base, "this directory").merge_and_unload()
```

| made from | |
|---|---|
{origin}
"""


def transformers_reads(source: str) -> bool:
    """Whether transformers finds the model under the name that it has here."""
    own_names = (*PACKAGED_MODELS, *KNOWN_MODELS)
    return source not in own_names and resolve(source).kind == "hf"


def write_peft(adapter: ExportedAdapter, directory: Path, dtype: str) -> None:
    """Writes the adapter into `directory`, which exists.

    α is the rank, so that PEFT's scaling α/r is 1.

    Raises:
        ConfigError: for a factor beyond the dtype's range.
    """
    tensors: dict[str, np.ndarray] = {}
    modules: list[str] = []
    for name, a, b in adapter.modules():
        # PEFT's wrapper is base_model, and the causal language model in it is model.
        for letter, values in (("A", a), ("B", b)):
            key = f"base_model.model.{name}.lora_{letter}.weight"
            tensors[key] = cast(values, np.dtype(dtype), key)
        modules.append(name.rsplit(".", 1)[-1])
    targets = list(dict.fromkeys(modules))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.source,
        "revision": None,
        "r": adapter.rank,
        "lora_alpha": adapter.rank,
        "target_modules": targets,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_tensors(directory / "adapter_model.safetensors", tensors)
    origin = "\n".join(f"| {name} | {value} |" for name, value in adapter.origin.items())
    base = f"base = AutoModelForCausalLM.from_pretrained({adapter.source!r})"
    if not transformers_reads(adapter.source):
        command = f"lora-gen export --base --edge {adapter.source} --format merged --out base"
        base = f'# {command}\nbase = AutoModelForCausalLM.from_pretrained("base")'
    card = CARD.format(source=adapter.source, base=base, rank=adapter.rank, modules=", ".join(targets), origin=origin)
    (directory / "README.md").write_text(card, encoding="utf-8")


FORMAT = Format("PEFT adapter", write_peft, lambda out: f"peft.PeftModel.from_pretrained(model, {str(out)!r})")
