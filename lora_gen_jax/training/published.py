"""Generators on the Hugging Face hub: fetched by name, and published with a model card.

In: ``org/name``, or ``org/name@revision``; a packed generator. Out: a directory that `load_portable` reads; the URL of
a commit. A repository holds the two files of `portable` and README.md, and nothing else of it is downloaded.
"""

import logging
import math
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from safetensors import safe_open

from lora_gen_jax.config import ModelConfig
from lora_gen_jax.errors import CheckpointError, ConfigError, OutputError
from lora_gen_jax.hub import HUB_ID, download, name_of
from lora_gen_jax.training.portable import READABLE, TENSORS
from lora_gen_jax.untrusted import file_digest, read_object, reason_of

if TYPE_CHECKING:
    from lora_gen_jax.training.checkpoint import Loaded

log = logging.getLogger(__name__)
CARD = "README.md"
# Models that are fetched from elsewhere, by their names on the hub.
_ORIGINALS = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}


def fetch_generator(name: str, cached: bool = False) -> Path | None:
    """The directory of a published generator; None for what cannot be a name.

    Args:
        name: ``org/name`` or ``org/name@revision``.
        cached: take what is in the hub's cache, and ask nobody.

    Raises:
        CheckpointError: where there is none of this name, it cannot be downloaded, or is not a packed generator.
    """
    if HUB_ID.fullmatch(name) is None:
        return None
    directory = download(name, "generator", [TENSORS, READABLE], cached)
    missing = [file for file in (READABLE, TENSORS) if not (directory / file).is_file()]
    if not missing and not read_object(directory / READABLE, CheckpointError).get("sha256"):
        missing = [f"sha256 in {READABLE}"]
    if missing:
        problem = f"{name} on the Hugging Face hub is not a generator: it has no {' and no '.join(missing)}"
        remedy = "name a repository that `lora-gen pack --publish` wrote"
        raise CheckpointError(problem, field="--checkpoint", code="not a generator", remedy=remedy)
    log.info("generator %s of the Hugging Face hub", name_of(directory) or name)
    return directory


def cached_generator(name: str) -> Path | None:
    """As `fetch_generator`, from the hub's cache only; None where it is not there."""
    try:
        return fetch_generator(name, cached=True)
    except CheckpointError:
        return None


def check_publishing(repository: str) -> None:
    """Raises ConfigError, before anything is packed, for a malformed name and without a token."""
    import huggingface_hub

    if (found := HUB_ID.fullmatch(repository)) is None or found["revision"] is not None:
        remedy = "give ORG/NAME, a repository on the Hugging Face hub"
        raise ConfigError(f"--publish is {repository[:80]!r}", field="--publish", code="name", remedy=remedy)
    if huggingface_hub.get_token() is None:
        problem = "--publish needs a token of the Hugging Face hub, and none is found"
        raise ConfigError(problem, field="--publish", code="token", remedy="`hf auth login`, or set HF_TOKEN")


def publish_generator(directory: Path, repository: str, private: bool) -> str:
    """Writes a generator's files and its card to a repository, which is made where there is none, in one commit.

    Returns:
        the commit's URL.

    Raises:
        OutputError: when the hub refuses it, or cannot be reached.
    """
    from huggingface_hub import HfApi

    api, files = HfApi(library_name="lora_gen_jax"), [TENSORS, READABLE, CARD]
    try:
        api.create_repo(repository, private=private or None, exist_ok=True)
        message = "Generator packed by lora_gen_jax"
        upload = api.upload_folder(
            repo_id=repository, folder_path=directory, allow_patterns=files, commit_message=message
        )
        return upload.commit_url
    except Exception as error:  # the hub's client lets errors of several HTTP libraries through
        problem = f"{repository} could not be published on the Hugging Face hub ({reason_of(error)})"
        remedy = "Check the network and HF_HUB_OFFLINE, and that the token (`hf auth login`, or HF_TOKEN) may write"
        raise OutputError(problem, field="--publish", code="hub", remedy=remedy) from error


def model_card(directory: Path, repository: str, loaded: "Loaded", license_id: str) -> str:
    """README.md of a generator: the hub's metadata, how to use it, and what is known of it.

    Args:
        directory: that `save_portable` wrote.
        repository: ``org/name``.
        loaded: what was packed.
        license_id: of the generator, as the hub names licenses.
    """
    from huggingface_hub import ModelCardData

    config = loaded.config
    models = dict.fromkeys(name for model in (config.edge, config.cloud) if (name := _hub_name(model)))
    metadata = ModelCardData(
        license=license_id,
        base_model=list(models) or None,
        library_name="lora_gen_jax",
        tags=["lora-gen", "lora", "hypernetwork", "jax"],
    )
    facts = "\n".join(f"| {name} | {value} |" for name, value in _facts(directory, loaded).items())
    template = Path(__file__).with_name("card.md").read_text(encoding="utf-8")
    return template.format(
        metadata=metadata.to_yaml(), title=repository.partition("/")[2], repository=repository, facts=facts
    )


def _facts(directory: Path, loaded: "Loaded") -> dict[str, str]:
    config, settings = loaded.config, loaded.config.generator
    with safe_open(directory / TENSORS, framework="numpy") as file:
        slices = [file.get_slice(name) for name in file.keys() if name.startswith("params/")]  # noqa: SIM118
        numbers, dtype = sum(math.prod(x.get_shape()) for x in slices), slices[0].get_dtype()
    facts = {
        f"{name} model": f"{PurePath(model.source).name if _hub_name(model) is None else model.source}"
        f" (fingerprint `{loaded.fingerprints[name]}`)"
        for name, model in (("cloud", config.cloud), ("edge", config.edge))
    }
    if config.method == "lora_gen" and settings.generator == "meta_tokens":
        chosen = f", {settings.top_k} of them in a layer" if settings.routing == "keep_top_k" else ""
        facts["expert pool"] = f"{settings.num_experts} experts of rank {settings.rank}{chosen}"
    rows = f"{len(config.data.files)} files of rows" if config.data.files else ", ".join(config.data.tasks)
    return facts | {
        "method": f"`{config.method}`, config `{config.name}`; all settings are in `{READABLE}`",
        "trained on": rows or "not recorded",
        "steps": f"{loaded.step} of {config.data.prompts_per_step} prompts; seed {config.train.seed}",
        "parameters": f"{numbers:,} ({dtype}), {(directory / TENSORS).stat().st_size / 1e6:.1f} MB",
        "made with": ", ".join(f"{name} {version}" for name, version in loaded.versions.items()),
        f"SHA-256 of `{TENSORS}`": f"`{file_digest(directory / TENSORS)}`",
    }


def _hub_name(model: ModelConfig) -> str | None:
    """A model's repository on the hub, if it is known."""
    if (original := _ORIGINALS.get(model.source)) is not None:
        return original
    found = HUB_ID.fullmatch(model.source)
    return None if found is None or Path(model.source).exists() else found["id"]
