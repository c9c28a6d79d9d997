"""Loads the tokenizer of a model.

In: a source. Out: a transformers tokenizer. Works without PyTorch, and does not import it where it is installed as
long as the model has a ``tokenizer.json``.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lora_gen_jax.decoder.pretrained.sources import Source, resolve
from lora_gen_jax.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def load_tokenizer(source: str | os.PathLike[str] | Source) -> "PreTrainedTokenizerFast":
    """The tokenizer of a model, or of a directory that holds only a tokenizer.

    Raises:
        ModelError: there is none, its files are damaged, or the one in a GGUF file cannot be converted.
    """
    found = resolve(source)
    directory = found.tokenizer
    if found.kind == "gguf" and not (directory / "tokenizer.json").is_file():
        from lora_gen_jax.decoder.pretrained.gguf_tokenizer import gguf_tokenizer

        try:
            gguf_tokenizer(found.model, directory)
        except OSError as error:
            raise ModelError(
                f"the tokenizer of {found.model} cannot be written to {directory} ({error})",
                field="LORA_GEN_CACHE",
                remedy="set LORA_GEN_CACHE to a directory that can be written",
            ) from error
    has_json = (directory / "tokenizer.json").is_file()
    if not has_json and not any((directory / name).is_file() for name in ("vocab.json", "tokenizer.model")):
        raise ModelError(
            f"{directory} holds no tokenizer",
            field="tokenizer.json",
            remedy="put the model's tokenizer.json and its config there",
        )
    with _quiet_transformers():
        # AutoTokenizer imports PyTorch where it can; with a tokenizer.json the general class does the same without.
        if has_json:
            from transformers import PreTrainedTokenizerFast as tokenizer_class
        else:
            from transformers import AutoTokenizer as tokenizer_class
        try:
            return tokenizer_class.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # tokenizers raises plain Exception for a damaged file
            raise ModelError(
                f"the tokenizer in {directory} cannot be read ({error})",
                field="tokenizer.json",
                remedy="download it again",
            ) from error


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    # Without PyTorch the first import of transformers prints advice, unless this variable is set.
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        from transformers.utils import logging

        level = logging.get_verbosity()
        logging.set_verbosity_error()
        try:
            yield
        finally:
            logging.set_verbosity(level)
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
