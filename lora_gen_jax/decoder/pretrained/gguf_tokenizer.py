"""Turns the tokenizer inside a GGUF file into one that transformers reads.

In: a ``.gguf`` file with a byte-level BPE vocabulary. Out: a directory with ``tokenizer.json`` and
``tokenizer_config.json`` (special tokens and chat template).
"""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from lora_gen_jax.decoder.pretrained.gguf_file import GGUFFile, open_gguf
from lora_gen_jax.errors import ModelError
from lora_gen_jax.untrusted import check_fields, reason_of

_CONTROL, _USER_DEFINED = 3, 4  # llama.cpp's token types
# As in the tokenizer.json of Llama 3 and of Qwen2; they differ in how many digits stay together.
_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PRE_TOKENIZERS = ("smollm", "llama-bpe", "qwen2")


def gguf_tokenizer(path: Path, directory: Path) -> Path:
    """Writes the tokenizer of a GGUF file to a directory, which appears complete or not at all.

    Args:
        path: the ``.gguf`` file.
        directory: to create. If it exists already, it is left as it is.

    Returns:
        The directory.

    Raises:
        ModelError: the file is damaged, or its kind of tokenizer is not supported.
    """
    if directory.exists():
        return directory
    file = open_gguf(path)
    tokenizer = _build(file)
    config = _tokenizer_config(file)
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        tokenizer.save(str(temporary / "tokenizer.json"))
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (temporary / "tokenizer_config.json").write_text(text, encoding="utf-8")
        temporary.chmod(0o755)
        os.rename(temporary, directory)
    except OSError:
        # Another process may have been faster; its result is the same.
        if not directory.is_dir():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return directory


def _build(file: GGUFFile) -> Tokenizer:
    kind, pre = file.metadata.get("tokenizer.ggml.model"), file.metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2" or pre not in _PRE_TOKENIZERS:
        raise ModelError(
            f"{file.path}: its tokenizer ({kind}, pre-tokenizer {pre}) cannot be converted; only byte-level BPE with"
            f" {', '.join(_PRE_TOKENIZERS)} can",
            field=f"{file.path.name}:tokenizer.ggml.pre",
            remedy="Put the model's tokenizer.json and tokenizer_config.json beside the file",
        )
    missing = [name for name in ("tokens", "merges") if f"tokenizer.ggml.{name}" not in file.metadata]
    if missing:
        raise ModelError(
            f"{file.path} lacks the field tokenizer.ggml.{missing[0]}",
            field=f"{file.path.name}:tokenizer.ggml.{missing[0]}",
            remedy="download it again",
        )
    tokens: list[str] = file.metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in file.metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    types = file.metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    if len(vocabulary) != len(tokens) or len(types) != len(tokens):
        raise _damaged(file, "tokens", "each token must stand there once, with one type")
    try:
        tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges, ignore_merges=pre == "llama-bpe"))
    except Exception as error:  # tokenizers raises plain Exception
        raise _damaged(file, "merges", reason_of(error)) from error
    tokenizer.pre_tokenizer = _pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    added = [(token, kind) for token, kind in zip(tokens, types, strict=True) if kind in (_CONTROL, _USER_DEFINED)]
    tokenizer.add_tokens([AddedToken(token, special=kind == _CONTROL, normalized=False) for token, kind in added])
    if file.metadata.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe"):
        bos = _special(file, "bos")
        if bos is None:
            raise _damaged(file, "bos_token_id", "it is missing")
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[tokens[bos], "$A"],
            pair=[tokens[bos], "$A", f"{tokens[bos]}:1", "$B:1"],
            special_tokens=[(tokens[bos], bos)],
        )
    return tokenizer


def _special(file: GGUFFile, field: str) -> int | None:
    """The id of a special token, which must be one of the tokens."""
    name = f"tokenizer.ggml.{field}_token_id"
    place: Any = Annotated[int, 0, len(file.metadata["tokenizer.ggml.tokens"]) - 1]
    check_fields(file.metadata, {name: place | None}, file.path.name, ModelError)
    return file.metadata.get(name)


def _damaged(file: GGUFFile, field: str, reason: str) -> ModelError:
    name = f"tokenizer.ggml.{field}"
    return ModelError(
        f"{file.path}: {name}: {reason}", field=f"{file.path.name}:{name}", code="damaged", remedy="download it again"
    )


def _pre_tokenizer(pre: str) -> Any:
    if pre == "smollm":
        parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    else:
        digits = r"\p{N}{1,3}" if pre == "llama-bpe" else r"\p{N}"
        split = pre_tokenizers.Split(Regex(_SPLIT % digits), behavior="isolated")
        parts = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    return pre_tokenizers.Sequence(parts)


def _tokenizer_config(file: GGUFFile) -> dict[str, Any]:
    tokens = file.metadata["tokenizer.ggml.tokens"]
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    fields = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    for name, field in fields.items():
        token_id = _special(file, field)
        if token_id is not None:
            config[name] = tokens[token_id]
    template = file.metadata.get("tokenizer.chat_template")
    return config if template is None else config | {"chat_template": template}
