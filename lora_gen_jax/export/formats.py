"""The formats of exported adapters, by what ``--format`` calls them.

In: a name. Out: its `Format`. To add one, write its file in `lora_gen_jax/export/`, which ends with `FORMAT`, and its
line here. A file is imported when it is asked for, as formats need libraries of their own.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from lora_gen_jax.decoder.config import DecoderConfig
    from lora_gen_jax.export.factors import ExportedAdapter

FORMATS = {
    "peft": ("lora_gen_jax.export.peft", "a LoRA adapter for transformers with peft, and vLLM"),
    "gguf": ("lora_gen_jax.export.gguf", "a LoRA adapter for llama.cpp"),
}
"""Each with its file and what it is."""


class Format(NamedTuple):
    """How an adapter is written for other programs.

    Attributes:
        title: of what is written.
        write: the adapter into a directory, which exists, in the dtype of this name.
        load: from the directory to what a user types to load it.
        check: raises ConfigError for an edge model that the format has no place for.
    """

    title: str
    write: Callable[["ExportedAdapter", Path, str], None]
    load: Callable[[Path], str]
    check: Callable[["DecoderConfig"], None] = lambda config: None


def format_of(name: str) -> Format:
    """The format of a name in `FORMATS`."""
    return importlib.import_module(FORMATS[name][0]).FORMAT
