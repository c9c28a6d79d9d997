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
        refined.EQUAL_REFINED,
        refined.SHOTS_LORA,
    )
}
TRAINED = tuple(key for key, method in METHODS.items() if method.build is not None)
"""Those that a config's `method` can name."""
PROMPT_READING_METHODS = tuple(key for key, method in METHODS.items() if method.may_read_prompt)
"""Those whose edge model may read the prompt like any text (`data.edge_reads_prompt`)."""


def trained_method(key: str) -> Method:
    """The method that training trains.

    Raises:
        ConfigError: for one that nothing is trained for.
    """
    if key not in TRAINED:
        raise ConfigError(f"method is {key!r}; training can train {', '.join(TRAINED)}", field="method")
    return METHODS[key]


def make_generator(config: Config, pair: Pair) -> Any:
    """The trainable module (`TrainedModule`) of the config's method.

    Raises:
        ConfigError: for a method that nothing is trained for.
    """
    build = trained_method(config.method).build
    assert build is not None
    return build(config, pair)
