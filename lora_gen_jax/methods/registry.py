"""The methods that are compared, by their key in configs and results.

In: a key. Out: its `Method`. To add one, write its file in `lora_gen_jax/methods/` and its line here.
"""

from typing import Any

from lora_gen_jax.config import Config
from lora_gen_jax.errors import ConfigError
from lora_gen_jax.methods import autocompressor, icl, lora, lora_gen, lora_moe, lorahub, mixlora, refined, task_vector
from lora_gen_jax.methods.method import Method
from lora_gen_jax.models import Pair

METHODS: dict[str, Method] = {
    method.key: method
    for method in (
        icl.BASE,
        icl.METHOD,
        task_vector.METHOD,
        lora.METHOD,
        lora_moe.METHOD,
        mixlora.METHOD,
        lorahub.METHOD,
        autocompressor.METHOD,
        lora_gen.METHOD,
        refined.REFINED,
        refined.REFINED_LORA,
        refined.REFINED_BOTH,
        refined.EQUAL_REFINED,
        refined.SHOTS_LORA,
    )
}
GENERATOR = lora_gen.METHOD
"""The method that this project is about: its cloud model, its gates and its pool are measured and drawn."""
BASE, FULL_PROMPT, BASELINE = icl.BASE, icl.METHOD, lora.METHOD
"""What others are compared with: the edge model alone, its context with the whole prompt, the usual fine-tuning."""


def trained_methods() -> list[str]:
    """Those that a config's `method` can name."""
    return [key for key, method in METHODS.items() if method.build is not None]


def trained_method(key: str) -> Method:
    """The method that training trains.

    Raises:
        ConfigError: for one that nothing is trained for.
    """
    if key not in (known := trained_methods()):
        raise ConfigError(f"method is {key!r}; training can train {', '.join(known)}", field="method")
    return METHODS[key]


def make_generator(config: Config, pair: Pair) -> Any:
    """The trainable module (`TrainedModule`) of the config's method.

    Raises:
        ConfigError: for a method that nothing is trained for.
    """
    build = trained_method(config.method).build
    assert build is not None
    return build(config, pair)
