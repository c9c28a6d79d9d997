"""Whether the fields of a `Config` fit together.

In: a config. Out: the same, or an error that names the field and the remedy, before anything is loaded or written.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterator
from typing import Any, get_type_hints

from lora_gen_jax.adapters.protocol import SITES
from lora_gen_jax.config import Config, DataConfig, DistributedConfig, GeneratorConfig
from lora_gen_jax.errors import ConfigError
from lora_gen_jax.methods.registry import METHODS, PROMPT_READING_METHODS, trained_method
from lora_gen_jax.untrusted import fits, wanted

POSITIVE = (
    "generator.num_experts",
    "generator.top_k",
    "generator.rank",
    "generator.direct_width",
    "generator.router_width",
    "data.prompts_per_step",
    "data.prompts_per_row",
    "data.cloud_length",
    "data.edge_length",
    "data.queries_per_prompt",
    "data.response_slots",
    "data.query_length",
    "data.rows_per_block",
    "train.validate_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "cloud.unroll",
    "edge.unroll",
    "eval.batch_tokens",
    "eval.prompt_limit",
    "distributed.processes",
    "hub.modules",
    "hub.budget",
    "compressor.summary_tokens",
)


def check(config: Config) -> Config:
    """The config itself, when its fields fit together.

    Raises:
        ConfigError: naming the field and the remedy.
    """
    for message in wrong_values(config):
        raise _wrong(message, "type")
    check_saved(config)
    parts = (_distributed_rules(config.distributed), _data_rules(config.data), _method_rules(config))
    for holds, message in (*itertools.chain(*parts), *_run_rules(config)):
        if not holds:
            raise _wrong(message, "range")
    return config


def check_saved(config: Config) -> Config:
    """What must hold of a saved config as well, which may lack its data: its method, and the generator's sizes.

    Raises:
        ConfigError: naming the field.
    """
    trained_method(config.method)
    for field in POSITIVE:
        part, name = field.split(".")
        value = getattr(getattr(config, part), name)
        if value is not None and value < 1:
            raise ConfigError(f"{field} is {value}; it must be at least 1", field=field, code="range")
    for holds, message in _generator_rules(config.generator):
        if not holds:
            raise _wrong(message, "range")
    return config


def _wrong(message: str, code: str) -> ConfigError:
    """An error about the field whose name its message begins with, as all messages of this module do."""
    return ConfigError(message, field=message.split(maxsplit=1)[0].rstrip(","), code=code)


def wrong_values(part: Any, prefix: str = "") -> Iterator[str]:
    """What is said of each field whose value is not of the field's type, or not finite: config files are not checked.

    Args:
        part: a config dataclass, and those inside it.
        prefix: before its fields' names.
    """
    for name, hint in get_type_hints(type(part)).items():
        value = getattr(part, name)
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            if isinstance(value, hint):
                yield from wrong_values(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name} is {value!r}; write {hint.__name__}(…)"
        elif not fits(value, hint):
            yield f"{prefix}{name} is {value!r}; it must be {wanted(hint)}"


def trained(config: Config) -> list[str]:
    """The methods that a run trains: its own, and those it is compared with."""
    compared = [name for name in config.compare if name in METHODS and METHODS[name].build is not None]
    return list(dict.fromkeys([config.method, *compared]))


def _generator_rules(g: GeneratorConfig) -> list[tuple[bool, str]]:
    return [
        (g.top_k <= g.num_experts, f"generator.top_k is {g.top_k}; at most generator.num_experts = {g.num_experts}"),
        (
            g.lora_sites is None or (bool(g.lora_sites) and set(g.lora_sites) <= set(SITES)),
            f"generator.lora_sites is {g.lora_sites}; name some of {', '.join(SITES)}",
        ),
        (0 <= g.dropout < 1, f"generator.dropout is {g.dropout}; it must lie in [0, 1)"),
        (0 <= g.router_dropout < 1, f"generator.router_dropout is {g.router_dropout}; it must lie in [0, 1)"),
        (
            (g.router_input == "meta") != bool(g.pooled_layers),
            f"generator.router_input is {g.router_input!r} and generator.pooled_layers {g.pooled_layers}: name layers"
            " for pooled or both, none for meta",
        ),
        (
            g.router_input != "pooled" or g.router_heads == "per_layer",
            "generator.router_input is pooled, the same for all layers: set generator.router_heads to per_layer",
        ),
        (
            g.batch_norm or g.routing != "linear",
            "generator.routing is linear, whose gates are normalized logits: set generator.batch_norm to True",
        ),
        (
            g.train_cloud or g.cloud_rank == 0,
            f"generator.train_cloud is False with generator.cloud_rank = {g.cloud_rank}: set the rank to 0, a LoRA that"
            " is never trained adds nothing",
        ),
        (g.cloud_rank >= 0, f"generator.cloud_rank is {g.cloud_rank}; it must be 0 or more"),
        (g.cv_coefficient >= 0, f"generator.cv_coefficient is {g.cv_coefficient}; it must be 0 or more"),
        (g.alpha > 0, f"generator.alpha is {g.alpha}; it must be positive: it scales what an expert adds"),
        (g.cloud_alpha > 0, f"generator.cloud_alpha is {g.cloud_alpha}; it must be positive"),
        (
            g.balance_coefficient >= 0,
            f"generator.balance_coefficient is {g.balance_coefficient}; it must be 0 or more",
        ),
        (
            g.gumbel_temperature > 0,
            f"generator.gumbel_temperature is {g.gumbel_temperature}; it must be positive",
        ),
    ]


def _distributed_rules(d: DistributedConfig) -> list[tuple[bool, str]]:
    place, count = (d.coordinator, d.process), d.processes or 0
    alone = count == 1 and place == (None, None)
    return [
        (
            alone or None not in (*place, d.processes) or (*place, d.processes) == (None, None, None),
            "distributed.coordinator, distributed.processes and distributed.process belong together: give all three, or"
            " none where the system tells the processes of each other",
        ),
        (
            d.coordinator is None or (d.coordinator.rpartition(":")[2].isdecimal() and ":" in d.coordinator),
            f"distributed.coordinator is {d.coordinator!r}; write HOST:PORT",
        ),
        (
            d.process is None or 0 <= d.process < count,
            f"distributed.process is {d.process}; it must lie between 0 and distributed.processes - 1 = {count - 1}",
        ),
        (
            d.heartbeat_seconds >= 10,
            f"distributed.heartbeat_seconds is {d.heartbeat_seconds}; it must be at least 10",
        ),
    ]


def _data_rules(d: DataConfig) -> list[tuple[bool, str]]:
    return [
        (
            d.prompts_per_step % d.prompts_per_row == 0,
            f"data.prompts_per_row = {d.prompts_per_row} must divide data.prompts_per_step = {d.prompts_per_step}",
        ),
        (d.shot_length >= 0, f"data.shot_length is {d.shot_length}; it must be 0 or more"),
        (d.workers >= 0, f"data.workers is {d.workers}; it must be 0 or more"),
        (
            0 <= d.min_shots <= d.max_shots,
            f"data.min_shots = {d.min_shots} must lie between 0 and data.max_shots = {d.max_shots}",
        ),
        (
            d.query_length <= d.edge_length,
            f"data.query_length = {d.query_length} is more than data.edge_length = {d.edge_length} holds",
        ),
    ]


def _method_rules(config: Config) -> list[tuple[bool, str]]:
    h, d, compresses = config.hub, config.data, config.method == "autocompressor"
    g, own = config.generator, config.method == "lora_gen"
    taught = config.train.reader_prompts > 0
    return [
        (
            not taught or (own and g.generator == "meta_tokens"),
            "train.reader_prompts teaches the router of method lora_gen with generator meta_tokens: set it to 0",
        ),
        (
            taught or not g.standardize,
            "generator.standardize takes its statistics from train.reader_prompts prompts: set that to a thousand or"
            " more",
        ),
        (
            config.train.inner_steps == 0 or (own and g.generator == "meta_tokens"),
            "train.inner_steps trains the gates of method lora_gen with generator meta_tokens: set it to 0",
        ),
        (
            (config.train.inner_steps > 0) == (d.shot_length > 0),
            f"data.shot_length is {d.shot_length} and train.inner_steps {config.train.inner_steps}: inner steps learn"
            " from a prompt's shots, laid out in a row of that many tokens; set both or neither",
        ),
        (
            d.prompts_per_step > 1 or not (own and g.batch_norm and g.batch_norm_by_layer),
            "data.prompts_per_step is 1: generator.batch_norm_by_layer needs statistics over several prompts; raise it",
        ),
        (0 <= config.lora_moe.margin <= 1, f"lora_moe.margin is {config.lora_moe.margin}; it must lie in [0, 1]"),
        (h.bound > 0, f"hub.bound is {h.bound}; it must be positive"),
        (h.penalty >= 0, f"hub.penalty is {h.penalty}; it must be 0 or more"),
        (
            config.compressor.segments >= 2,
            f"compressor.segments is {config.compressor.segments}; it must be at least 2: one of the prompt, and the"
            " queries",
        ),
        (
            config.compressor.substep < 2 or (config.compressor.segments - 1) % config.compressor.substep > 0,
            f"compressor.segments - 1 = {config.compressor.segments - 1} is a multiple of compressor.substep ="
            f" {config.compressor.substep}: the queries begin a substep, and no answer would teach the summary tokens;"
            " change one of them",
        ),
        (
            config.compressor.substep >= 2,
            f"compressor.substep is {config.compressor.substep}; it must be at least 2: summary tokens learn from the"
            " segment that reads them",
        ),
        (
            not compresses or d.edge_prompt_length > 0,
            "data.edge_prompt_length is 0: method autocompressor reads prompts in the edge model's tokens; say how long"
            " they may be",
        ),
        (
            d.edge_prompt_length >= 0,
            f"data.edge_prompt_length is {d.edge_prompt_length}; it must be 0 or more",
        ),
    ]


def _run_rules(config: Config) -> list[tuple[bool, str]]:
    t, e = config.train, config.eval
    return [
        (
            re.match(r"[a-z0-9]{2,}:/", str(config.directory)) is None,
            f"workdir is {config.directory}, a bucket's address: name a directory, and the bucket with --bucket, which"
            " takes the checkpoints (docs/pods.md)",
        ),
        (
            config.bucket is None or re.fullmatch(r"gs://[^/]+/.+", config.bucket) is not None,
            f"bucket is {config.bucket!r}; it must be gs://NAME/DIR",
        ),
        (t.steps >= 1 or t.epochs is not None, f"train.steps is {t.steps}; it must be at least 1"),
        (
            t.epochs is None or t.epochs > 0,
            f"train.epochs is {t.epochs}; it must be positive, or None",
        ),
        (
            t.epochs is None or t.steps == 0,
            f"train.epochs is {t.epochs} and train.steps {t.steps}: give one of them; beside epochs set train.steps to"
            " 0, for a number of steps train.epochs to None",
        ),
        (0 <= t.seed < 2**31, f"train.seed is {t.seed}; it must lie between 0 and 2**31 - 1"),
        (t.learning_rate > 0, f"train.learning_rate is {t.learning_rate}; it must be positive"),
        (0 <= t.beta1 < 1, f"train.beta1 is {t.beta1}; it must lie in [0, 1)"),
        (0 <= t.beta2 < 1, f"train.beta2 is {t.beta2}; it must lie in [0, 1)"),
        (t.weight_decay >= 0, f"train.weight_decay is {t.weight_decay}; it must be 0 or more"),
        (t.validation_batches >= 0, f"train.validation_batches is {t.validation_batches}; it must be 0 or more"),
        (t.inner_steps >= 0, f"train.inner_steps is {t.inner_steps}; it must be 0 or more"),
        (t.inner_rate > 0, f"train.inner_rate is {t.inner_rate}; it must be positive"),
        (0 <= t.inner_swapped <= 1, f"train.inner_swapped is {t.inner_swapped}; it must lie in [0, 1]"),
        (t.inner_after >= 0, f"train.inner_after is {t.inner_after}; it must be 0 or more"),
        (t.warmup_steps >= 0, f"train.warmup_steps is {t.warmup_steps}; it must be 0 or more"),
        (t.clip_norm is None or t.clip_norm > 0, f"train.clip_norm is {t.clip_norm}; it must be positive or left out"),
        (e.shots >= 0, f"eval.shots is {e.shots}; it must be 0 or more"),
        (
            0 < e.vector_layer <= 1,
            f"eval.vector_layer is {e.vector_layer}; a share of the layers, at most 1",
        ),
        (0 < e.lora_steps <= 1000, f"eval.lora_steps is {e.lora_steps}; it must be from 1 to 1000"),
        (e.lora_rate > 0, f"eval.lora_rate is {e.lora_rate}; it must be positive"),
        (
            (e.refine.kind, e.refine_lora.kind) == ("gates", "lora"),
            f"eval.refine.kind is {e.refine.kind!r}, of methods that train gates, and eval.refine_lora.kind"
            f" {e.refine_lora.kind!r}, of one that trains factors: leave both out",
        ),
        (e.limit is None or e.limit > 0, f"eval.limit is {e.limit}; at least 1"),
        (
            e.split == "test" or not any(name.startswith("lm_eval/") for name in e.tasks),
            "eval.split is validation, but lm_eval/ tasks have a split of their own: leave them out of eval.tasks",
        ),
        (
            not config.data.edge_reads_prompt or all(METHODS[m].may_read_prompt for m in trained(config)),
            f"data.edge_reads_prompt is for the methods {', '.join(PROMPT_READING_METHODS)}; the others' edge model"
            " need not read the prompt: leave it out, or the others (method, compare)",
        ),
    ]
