"""The methods that can be scored, as `System`s.

In: a pair of models and the checkpoints of the methods that learn. Out: for each method how it makes the edge model's
weights for a task, and whether the edge reads the prompt.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_gen_jax.adapters.merge import merge
from lora_gen_jax.config import Config
from lora_gen_jax.data.tasks import Task
from lora_gen_jax.errors import CheckpointError, ConfigError
from lora_gen_jax.evaluation.subject import content_of, digest_of, identity_of
from lora_gen_jax.evaluation.task import System, task_prompt
from lora_gen_jax.generator.lora_gen import Generated
from lora_gen_jax.generator.specialize import specialize
from lora_gen_jax.models import Pair, make_generator
from lora_gen_jax.training.checkpoint import Loaded, check_method, check_models, find_checkpoint, load_checkpoint

# Each method with the method whose checkpoint it needs.
METHODS = {"base": None, "icl": None, "lora": "lora", "lora_gen": "lora_gen", "shuffled": "lora_gen"}


def check_methods(methods: Sequence[str], field: str) -> None:
    """Raises ConfigError for no method or an unknown one."""
    if not methods:
        raise ConfigError(f"{field} is empty; name some of {', '.join(METHODS)}")
    for method in methods:
        if method not in METHODS:
            raise ConfigError(f"{field} has {method!r}; the methods are {', '.join(METHODS)}")


def check_tasks(methods: Sequence[str], tasks: Sequence[Task]) -> None:
    """Raises ConfigError for "shuffled" with a single task."""
    if "shuffled" in methods and len(tasks) < 2:
        raise ConfigError("method shuffled takes the prompt of another task: score at least two tasks")


def load_checkpoints(config: Config, methods: Sequence[str], named: Path | None) -> dict[str, Loaded]:
    """The checkpoint of every learned method among `methods`.

    That of the config's own method is found as `find_checkpoint` does; another method's is looked for in the directory
    of its name inside the work directory, where a comparison puts it.

    Raises:
        CheckpointError: when one is missing, or holds another method.
    """
    found = {}
    for method in dict.fromkeys(METHODS[m] for m in methods):
        if method is None:
            continue
        own = method == config.method
        found[method] = loaded = find_checkpoint(config, named) if own else beside(named or config.directory, method)
        check_method(loaded, method)
    return found


def beside(directory: Path, method: str) -> Loaded:
    """The checkpoint of a method that a run was compared with.

    Raises:
        CheckpointError: when there is none.
    """
    if not (directory / method).is_dir():
        raise CheckpointError(
            f"{directory} has no run of method {method}: name {method} in the config's compare and train, or leave it"
            " out of the methods"
        )
    return load_checkpoint(directory / method)


def make_systems(
    config: Config, methods: Sequence[str], pair: Pair, checkpoints: dict[str, Loaded], tasks: Sequence[Task]
) -> dict[str, System]:
    """One `System` a method.

    Args:
        config: for the prompts: eval.shots, eval.seed and eval.prompt_limit.
        methods: keys of `METHODS`.
        pair: of models.
        checkpoints: as `load_checkpoints` gives them.
        tasks: that will be scored; "shuffled" gives each the prompt of the next.

    Raises:
        CheckpointError: when a checkpoint was trained on other models.
        ConfigError: for "shuffled" with a single task.
    """
    systems = {}
    check_tasks(methods, tasks)
    for loaded in checkpoints.values():
        check_models(loaded.fingerprints, pair.fingerprints, f"checkpoint {loaded.path}")
    for method in methods:
        if method in ("base", "icl"):
            systems[method] = base_system(pair, reads_prompt=method == "icl")
        elif method == "lora":
            systems[method] = multi_task_system(pair, checkpoints["lora"])
        else:
            others = [*tasks[1:], tasks[0]] if method == "shuffled" else tasks
            prompts = {id(task): other for task, other in zip(tasks, others, strict=True)}
            systems[method] = prompted_system(config, pair, checkpoints["lora_gen"], prompts)
    return systems


def base_system(pair: Pair, reads_prompt: bool) -> System:
    """The edge model as it is."""
    params, identity = pair.edge.params, identity_of(pair.edge, {"method": "base"})
    return System(lambda task: params, reads_prompt, lambda task: identity)


def multi_task_system(pair: Pair, loaded: Loaded, reads_prompt: bool = False) -> System:
    """The edge model with a LoRA that is the same for all tasks; merged when it is first needed."""
    merged, identity = functools.cache(functools.partial(multi_task, pair, loaded)), identifier(pair, loaded)("")
    return System(lambda task: merged(), reads_prompt, lambda task: identity)


def prompted_system(config: Config, pair: Pair, loaded: Loaded, prompts: Mapping[int, Task] | None = None) -> System:
    """LoRA-Gen: every task with its own prompt, or with that of the task which `prompts` has for its `id`."""
    make, identify = specializer(config, pair, loaded), identifier(pair, loaded)

    def source(task: Task) -> Task:
        return task if prompts is None else prompts[id(task)]

    return System(
        lambda task: make(source(task)), False, lambda task: identify(task_prompt(source(task), config.eval) or "")
    )


def identifier(pair: Pair, loaded: Loaded) -> Callable[[str], str]:
    """From a prompt, "" for none, to hex digits of all that the model depends on which a generator makes of it."""
    made = description_of(pair, loaded)

    def identify(prompt: str) -> str:
        ids = pair.cloud.encoder.prompt(prompt) if prompt else []
        return identity_of(pair.edge, made | {"prompt": digest_of(repr(ids))})

    return identify


def description_of(pair: Pair, loaded: Loaded) -> dict[str, Any]:
    """A generator and its cloud model, as JSON holds them: digests, and the settings of the generator."""
    return {
        "method": loaded.config.method,
        "generator": content_of(loaded.variables),
        "settings": dataclasses.asdict(loaded.config.generator),
        "cloud": pair.cloud.fingerprint,
        "cloud_dtype": jnp.dtype(pair.cloud.decoder.dtype).name,
    }


def multi_task(pair: Pair, loaded: Loaded) -> Any:
    """The edge model with a LoRA that does not depend on the prompt merged in."""
    adapter: Any = make_generator(loaded.config, pair).apply(loaded.variables, None, None).adapter
    return merge(pair.edge.params, jax.device_put(adapter))


def specializer(config: Config, pair: Pair, loaded: Loaded) -> Callable[[Task], Any]:
    """From a task to the edge model specialised by its prompt; the base where it has none."""
    make = prompt_specializer(config, pair, loaded)

    def specialised(task: Task) -> Any:
        prompt = task_prompt(task, config.eval)
        return pair.edge.params if prompt is None else make(prompt)

    return specialised


def prompt_specializer(config: Config, pair: Pair, loaded: Loaded) -> Callable[[str], Any]:
    """From a prompt to the edge model's weights specialised by it."""
    generate = prompt_reader(config, pair, loaded)
    return lambda prompt: merge(pair.edge.params, generate(prompt).adapter.select(0))


def prompt_reader(config: Config, pair: Pair, loaded: Loaded) -> Callable[[str], Generated]:
    """From a prompt to what the generator says about it."""
    generator = make_generator(loaded.config, pair)

    def generate(prompt: str) -> Generated:
        ids = pair.cloud.encoder.prompt(prompt)
        return specialize(generator, loaded.variables, pair.cloud.params, [ids], config.eval.prompt_limit)

    return generate


def gates_of(config: Config, pair: Pair, loaded: Loaded, tasks: Sequence[Task]) -> dict[str, np.ndarray] | None:
    """The gates [L, E] of every task's prompt; None for a generator without gates."""
    generate, gates = prompt_reader(config, pair, loaded), {}
    for task in tasks:
        prompt = task_prompt(task, config.eval)
        if prompt is None:
            continue
        made = generate(prompt)
        if made.gates_PLE is None:
            return None
        gates[task.name] = np.asarray(made.gates_PLE[0])
    return gates
