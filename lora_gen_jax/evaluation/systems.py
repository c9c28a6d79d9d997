"""The methods that can be scored, as `System`s.

In: a pair of models and the checkpoints of the methods that learn. Out: for each method how it makes the edge model's
weights for a task, and whether the edge reads the prompt.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from lora_gen_jax.config import Config
from lora_gen_jax.data.tasks import Task
from lora_gen_jax.errors import CheckpointError, ConfigError
from lora_gen_jax.evaluation.controls import CONTROLS, check_controls, prompts_under
from lora_gen_jax.evaluation.subject import content_of, digest_of, identity_of
from lora_gen_jax.evaluation.task import System, task_prompt
from lora_gen_jax.methods.lora_gen import reader
from lora_gen_jax.methods.method import Method, Prompt
from lora_gen_jax.methods.registry import BASE, GENERATOR, METHODS, trained_method
from lora_gen_jax.models import Pair, precision_of
from lora_gen_jax.training.bucket import location
from lora_gen_jax.training.checkpoint import Loaded, check_method, check_models, find_checkpoint, load_checkpoint


def checkpoints_needed() -> dict[str, str | None]:
    """Each system that can be scored, with the method whose checkpoint it needs."""
    own = {key: method.checkpoint or (key if method.build else None) for key, method in METHODS.items()}
    return {**own, **dict.fromkeys(CONTROLS, GENERATOR.key)}


def check_methods(names: Sequence[str], field: str) -> None:
    """Raises ConfigError for no method or an unknown one."""
    known = ", ".join(checkpoints_needed())
    if not names:
        remedy = f"name some of {known}"
        raise ConfigError(f"{field} is empty", field=field, code="empty", remedy=remedy)
    for name in names:
        if name not in checkpoints_needed():
            problem = f"{field} has {name!r}; the methods are {known}"
            raise ConfigError(problem, field=field, code="unknown")


def check_shots(names: Sequence[str], shots: Sequence[int]) -> None:
    """Raises ConfigError for no shots, where a method makes nothing of a prompt without them."""
    needing = [name for name in names if name in METHODS and METHODS[name].needs_shots]
    if needing and min(shots) < 1:
        remedy = "set eval.shots to 1 or more"
        raise ConfigError(f"method {needing[0]} learns from a task's shots", field="eval.shots", remedy=remedy)


def load_checkpoints(config: Config, names: Sequence[str], named: Path | None) -> dict[str, Loaded]:
    """The checkpoint of every method among `names` that learns.

    That of the config's own method is found as `find_checkpoint` does; another method's is looked for in the directory
    of its name inside the work directory, where a comparison puts it.

    Raises CheckpointError when one is missing, or holds another method.
    """
    found, needed = {}, checkpoints_needed()
    for method in dict.fromkeys(needed[name] for name in names):
        if method is None:
            continue
        own = method == config.method
        place = named or config.saved
        found[method] = loaded = find_checkpoint(config, named) if own else load_sibling_checkpoint(place, method)
        check_method(loaded, method)
    return found


def load_sibling_checkpoint(place: str | Path, method: str) -> Loaded:
    """The checkpoint of a method that a run was compared with.

    Raises CheckpointError when there is none.
    """
    directory = location(place) / method
    if not directory.is_dir():
        remedy = f"name {method} in the config's compare and train, or leave it out of the methods"
        raise CheckpointError(f"{place} has no run of method {method}", field="compare", remedy=remedy)
    return load_checkpoint(directory)


def make_systems(
    config: Config, names: Sequence[str], pair: Pair, checkpoints: dict[str, Loaded], tasks: Sequence[Task]
) -> dict[str, System]:
    """One `System` a name.

    Args:
        config: for the prompts: eval.shots, eval.seed and eval.prompt_limit.
        names: as `checkpoints_needed` has them.
        pair: of models.
        checkpoints: as `load_checkpoints` gives them.
        tasks: that will be scored.

    Raises:
        CheckpointError: when a checkpoint was trained on other models.
        ConfigError: as `check_controls`.
    """
    systems, needed = {}, checkpoints_needed()
    check_controls(names, tasks)
    for loaded in checkpoints.values():
        check_models(loaded.fingerprints, pair.fingerprints, f"checkpoint {loaded.path}")
    for name in names:
        loaded = checkpoints.get(needed[name] or "")
        if name in CONTROLS:
            prompts = prompts_under(name, tasks, config.eval, pair.cloud.encoder)
            systems[name] = system_of(config, pair, GENERATOR, loaded, prompts)
        else:
            systems[name] = system_of(config, pair, METHODS[name], loaded)
    return systems


def system_of(
    config: Config,
    pair: Pair,
    method: Method,
    loaded: Loaded | None = None,
    prompts: Callable[[Task], Prompt | None] | None = None,
) -> System:
    """A method: every task with its own prompt, or with that which `prompts` gives it.

    An edge model that was trained to read the prompt (`data.edge_reads_prompt`) reads it when it is scored, too.
    """
    make = method.specialize(config, pair, loaded)
    prompt_of = functools.cache(prompts or functools.partial(task_prompt, settings=config.eval))
    if loaded is None and not method.depends_on_prompt:
        identity = identity_of(pair.edge, {"method": BASE.key})
        return System(lambda task: make(None), method.edge_reads_prompt, lambda task: identity)
    asks, trained = method.depends_on_prompt, None if loaded is None else loaded.config
    identify = identifier(config, pair, loaded, {"method": method.key, "settings": method.settings(config)})
    return System(
        lambda task: make(prompt_of(task) if asks else None),
        method.edge_reads_prompt if trained is None else trained.data.edge_reads_prompt,
        lambda task: identify(prompt_of(task) if asks else None),
        asks,
        0 if trained is None else method.soft_tokens(trained),
        method.traits.transfers,
    )


def identifier(
    config: Config, pair: Pair, loaded: Loaded | None, asked: Mapping[str, Any] | None = None
) -> Callable[[Prompt | None], str]:
    """From a prompt to hex digits of all that the model depends on which a method makes of it.

    Args:
        config, pair: these.
        loaded: the checkpoint of a method that learns.
        asked: what else the method depends on, as JSON holds it.
    """
    made = {"asked": dict(asked or {}), **({} if loaded is None else description_of(config, pair, loaded))}

    def identify(prompt: Prompt | None) -> str:
        read = None
        if prompt is not None:
            rows = [[(row.query, row.response) for row in part] for part in (prompt.shots, prompt.queries)]
            read = (prompt.text, rows, prompt.chat)
        return identity_of(pair.edge, made | {"prompt": digest_of(repr(read))})

    return identify


def description_of(config: Config, pair: Pair, loaded: Loaded) -> dict[str, Any]:
    """What was trained and what reads prompts, as JSON holds them: digests, settings and versions."""
    trained, hub = loaded.config, config.hub
    return {
        "method": trained.method,
        "generator": content_of(loaded.variables),
        "settings": dataclasses.asdict(trained.generator),
        "compressor": dataclasses.asdict(trained.compressor),
        "hub": dataclasses.asdict(hub),
        "packages": {name: version(name) for name in trained_method(trained.method).packages},
        "cloud": pair.cloud.fingerprint,
        "cloud_dtype": precision_of(pair.cloud),
        "cloud_tokenizer": pair.cloud.encoder.digest,
    }


def gates_of(
    config: Config, pair: Pair, checkpoints: Mapping[str, Loaded], tasks: Sequence[Task]
) -> dict[str, np.ndarray] | None:
    """The gates [L, E] of every task's prompt; None without a generator, or for one without gates."""
    if GENERATOR.key not in checkpoints:
        return None
    generate, gates = reader(config, pair, checkpoints[GENERATOR.key]), {}
    for task in tasks:
        prompt = task_prompt(task, config.eval)
        if prompt is None:
            continue
        made = generate(prompt.text)
        if made.gates is None:
            return None
        gates[task.name] = np.asarray(made.gates.dense()[0])
    return gates
