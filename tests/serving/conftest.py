"""A tiny generator with random weights, and a server of it."""

import json

import httpx
import numpy as np
import pytest
from helpers import experiment, generator_variables
from serving_tools import KEY, MAX_NEW_TOKENS, PROMPTS, TEMPLATE, Puppet, serving

from lora_gen_jax.adapters.merge import merge
from lora_gen_jax.adapters.specialization_fit import adapter_of
from lora_gen_jax.generator.cloud import pack_prompts
from lora_gen_jax.inference.decode import GenerationSettings, generate
from lora_gen_jax.inference.edge_model import EdgeModel
from lora_gen_jax.methods.registry import make_generator
from lora_gen_jax.models import load_pair
from lora_gen_jax.serving.command import make_scheduler
from lora_gen_jax.serving.registry import Registry, Served
from lora_gen_jax.serving.service import Limits, Service
from lora_gen_jax.specializer import Specializer
from lora_gen_jax.training.checkpoint import Loaded, versions
from lora_gen_jax.training.portable import save_portable


@pytest.fixture(scope="session")
def generator_directory(tmp_path_factory):
    """A generator as `pack` leaves it, beside its model."""
    root = tmp_path_factory.mktemp("serving")
    config = experiment(root, root / "run")
    settings = root / "model" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": TEMPLATE}))
    pair = load_pair(config)
    generator = make_generator(config, pair)
    prompts = pack_prompts([pair.cloud.encoder.prompt(text) for text in PROMPTS.values()], 2, 3, 32)
    variables = generator_variables(generator, pair.cloud.params, prompts, seed=3)
    loaded = Loaded(1, variables, config, pair.fingerprints, versions(), root)
    save_portable(loaded, root / "generator", np.float32)
    return root / "generator"


@pytest.fixture(scope="session")
def specializer(generator_directory):
    return Specializer.load(generator_directory)


@pytest.fixture(scope="session")
def made(specializer):
    """{name: specialization} of `PROMPTS`."""
    return dict(zip(PROMPTS, specializer.specialize(list(PROMPTS.values())), strict=True))


@pytest.fixture(scope="session")
def registry_of(specializer, made):
    """A function: a registry that holds `PROMPTS`, of a limit and with a store."""
    served = Served.of(specializer)

    def build(limit=100, store=None):
        registry = Registry(limit, store)
        for name, specialization in made.items():
            registry.add(served.entry(name, specialization))
        return registry

    return build


@pytest.fixture(scope="session")
def offline(specializer, made):
    """A function: what `generate` says with merged weights, for a text or ids, without the server."""
    edge, merged = specializer.pair.edge, {}

    def say(name, prompt, length, **settings):
        if name not in merged:
            loaded = specializer.loaded
            adapter = None if name == "base" else adapter_of(made[name], loaded.variables, loaded.config.generator)
            merged[name] = edge.params if adapter is None else merge(edge.params, adapter)
        ids = edge.encoder.text(prompt) if isinstance(prompt, str) else prompt
        stop = [edge.encoder.end]
        (found,) = generate(
            EdgeModel(edge.decoder, merged[name]),
            [ids],
            GenerationSettings(max_new_tokens=length, stop_ids=stop, **settings),
        )
        return found

    return say


@pytest.fixture(scope="session")
def service(specializer, registry_of, tmp_path_factory):
    scheduler = make_scheduler(specializer, rows=4, context=96, queue=64)
    limits = Limits(max_new_tokens=MAX_NEW_TOKENS, body_bytes=20000, timeout=60, sequences=32)
    yield Service(scheduler, specializer, registry_of(12, tmp_path_factory.mktemp("store")), limits, KEY)
    assert scheduler.close(30)


@pytest.fixture(scope="session")
def url(service):
    with serving(service) as address:
        yield address


@pytest.fixture(scope="session")
def client(url):
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as client:
        yield client


@pytest.fixture
def puppet():
    return Puppet()
