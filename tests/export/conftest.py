"""Random edge models of every family on disk, and specializations of them with B and gates away from zero."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import CLOUD, SETTINGS, generator_variables, prompts_of, random_params, write_tokenizer

from lora_gen_jax.adapters.specialization import Specialization, save_specialization
from lora_gen_jax.adapters.specialization_fit import pool_fingerprint
from lora_gen_jax.config import Config, GeneratorConfig, ModelConfig
from lora_gen_jax.decoder.config import DecoderConfig
from lora_gen_jax.decoder.model import Decoder
from lora_gen_jax.decoder.pretrained import fingerprint, load_config
from lora_gen_jax.generator.lora_gen import LoRAGen
from lora_gen_jax.training.checkpoint import Loaded
from lora_gen_jax.training.portable import save_portable

VARIANTS = {
    "shared": SETTINGS,
    "per_layer": dataclasses.replace(SETTINGS, pool="per_layer"),
    "factors": dataclasses.replace(SETTINGS, mix="factors"),
    "gumbel": dataclasses.replace(SETTINGS, routing="gumbel"),
    "direct": dataclasses.replace(SETTINGS, generator="direct"),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """An edge model and a specialization of it, in memory and on disk."""

    edge: Path
    config: DecoderConfig
    settings: GeneratorConfig
    specialization: Specialization
    variables: Any
    directory: Path
    checkpoint: Path


def specialized(config: DecoderConfig, settings: GeneratorConfig, fingerprints: dict[str, str]) -> Any:
    """(specialization, variables) with random gates over a random pool, or with random factors; B away from zero."""
    rng, layers, rank = np.random.default_rng(7), config.num_layers, settings.rank
    generator = LoRAGen(Decoder(CLOUD), config, settings)
    variables = generator_variables(generator, random_params(CLOUD), prompts_of([4], 1, 16, layers))
    if settings.generator == "direct":
        tensors = {}
        for site in config.ffn_sites:
            inputs, outputs = config.site_shape(site)
            tensors[f"{site}.a"] = rng.standard_normal((layers, inputs, rank)).astype(np.float32) * np.float32(0.2)
            tensors[f"{site}.b"] = rng.standard_normal((layers, rank, outputs)).astype(np.float32) * np.float32(0.1)
    else:
        active = settings.active_experts
        # Other experts in every layer, the largest gate first, as they are stored.
        index = np.stack([rng.permutation(settings.num_experts)[:active] for _ in range(layers)]).astype(np.uint8)
        weight = -np.sort(-rng.random((layers, active)), axis=1)
        tensors = {"index": index, "weight": (weight / weight.sum(axis=1, keepdims=True)).astype(np.float32)}
    prints = fingerprints | {"pool": pool_fingerprint(variables)}
    return Specialization(tensors, prints, "a prompt that is nobody's business", None, {"jax": "1.2.3"}), variables


def write_case(root: Path, edge: Path, settings: GeneratorConfig) -> Case:
    """A specialization directory and a generator of its pool, as `specialize` and `pack` leave them."""
    config, prints = load_config(edge), {"cloud": "c" * 16, "edge": fingerprint(edge)}
    special, variables = specialized(config, settings, prints)
    save_specialization(special, root / "special")
    model = ModelConfig(str(edge), dtype="float32")
    loaded = Loaded(1, variables, Config(cloud=model, edge=model, generator=settings), prints, {}, root)
    save_portable(loaded, root / "generator", np.float32)
    return Case(edge, config, settings, special, variables, root / "special", root / "generator")


def build(family: str) -> Any:
    """A small random model of transformers whose logits are of order one."""
    import torch
    from hf_families import FAMILIES
    from hf_families import build as build_wild

    assert family in FAMILIES
    model = build_wild(family)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.15 if parameter.ndim > 1 else 0.3)
    return model.eval()


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """f(family, variant="shared") -> `Case`; each is written once."""
    done: dict[Any, Case] = {}
    edges: dict[str, Path] = {}

    def get(family: str, variant: str = "shared") -> Case:
        if family not in edges:
            edges[family] = tmp_path_factory.mktemp(family)
            build(family).save_pretrained(edges[family])
            write_tokenizer(edges[family])
        if (family, variant) not in done:
            root = tmp_path_factory.mktemp(f"{family}-{variant}")
            done[family, variant] = write_case(root, edges[family], VARIANTS[variant])
        return done[family, variant]

    return get
