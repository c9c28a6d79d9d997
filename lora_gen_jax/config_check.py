"""Whether the fields of a `Config` fit together.

In: a config. Out: the same, or an error that names the field and the remedy, before anything is loaded or written.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Any, get_type_hints

from lora_gen_jax.adapters.protocol import SITES
from lora_gen_jax.config import CompressorConfig, Config, DataConfig, DistributedConfig, GeneratorConfig
from lora_gen_jax.errors import ConfigError
from lora_gen_jax.methods.registry import GENERATOR, METHODS, trained_method
from lora_gen_jax.untrusted import fits, wanted

Rule = tuple[bool, str]
"""Whether it holds, and what is said where it does not, beginning with the field's name."""
_AT_LEAST = {
    1: "generator.num_experts generator.top_k generator.rank generator.direct_width generator.router_width"
    " data.prompts_per_step data.prompts_per_row data.cloud_length data.edge_length data.queries_per_prompt"
    " data.response_slots data.query_length data.rows_per_block train.validate_every train.checkpoint_every"
    " train.keep_checkpoints cloud.unroll edge.unroll eval.batch_tokens eval.prompt_limit eval.limit eval.lora_steps"
    " distributed.processes hub.modules hub.budget compressor.summary_tokens",
    2: "compressor.segments compressor.substep",
    0: "generator.cloud_rank generator.cv_coefficient generator.balance_coefficient data.shot_length data.workers"
    " data.min_shots data.edge_prompt_length train.seed train.weight_decay train.validation_batches train.inner_steps"
    " train.inner_after train.warmup_steps eval.shots hub.penalty",
    10: "distributed.heartbeat_seconds",
}
_ABOVE_0 = (
    "generator.alpha generator.cloud_alpha generator.gumbel_temperature train.epochs train.learning_rate"
    " train.inner_rate train.clip_norm eval.lora_rate eval.vector_layer hub.bound"
)
_BELOW_1 = "generator.dropout generator.router_dropout train.beta1 train.beta2"
_SHARES = "train.inner_swapped lora_moe.margin"
_AT_MOST = {"train.seed": 2**31 - 1, "eval.lora_steps": 1000, "eval.vector_layer": 1}


def check(config: Config) -> Config:
    """The config itself, when its fields fit together. Raises ConfigError naming the field and the remedy."""
    for message in wrong_values(config):
        raise _wrong(message, "type")
    check_saved(config)
    parts = (_distributed_rules(config.distributed), _data_rules(config.data), _compressor_rules(config))
    return _holding(config, itertools.chain(*parts, _method_rules(config), _run_rules(config)))


def check_saved(config: Config) -> Config:
    """What must hold of a saved config as well: its method, every number by itself, and the generator's fields.

    Raises ConfigError naming the field.
    """
    trained_method(config.method)
    return _holding(config, itertools.chain(_ranges(config), _generator_rules(config.generator)))


def _holding(config: Config, rules: Iterable[Rule]) -> Config:
    for holds, message in rules:
        if not holds:
            raise _wrong(message, "range")
    return config


def _wrong(message: str, code: str) -> ConfigError:
    """An error about the field whose name its message begins with."""
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


def _ranges(config: Config) -> Iterator[Rule]:
    """Of single numbers; one that may be left out is in its range then."""

    def rules(fields: str, low: float, high: float, words: str, open_low: bool = False) -> Iterator[Rule]:
        for field in fields.split():
            part, name = field.split(".")
            value = getattr(getattr(config, part), name)
            holds = value is None or ((low < value if open_low else low <= value) and value <= high)
            yield holds, f"{field} is {value}; it must be {words}"

    for low, fields in _AT_LEAST.items():
        yield from rules(fields, low, float("inf"), f"at least {low}")
    yield from rules(_ABOVE_0, 0, float("inf"), "positive", open_low=True)
    yield from rules(_SHARES, 0, 1, "in [0, 1]")
    yield from rules(_BELOW_1, 0, 1 - 2**-53, "in [0, 1)")
    for field, high in _AT_MOST.items():
        yield from rules(field, float("-inf"), high, f"at most {high}")


def _generator_rules(g: GeneratorConfig) -> list[Rule]:
    return [
        (g.top_k <= g.num_experts, f"generator.top_k is {g.top_k}; at most generator.num_experts = {g.num_experts}"),
        (
            g.lora_sites is None or (bool(g.lora_sites) and set(g.lora_sites) <= set(SITES)),
            f"generator.lora_sites is {g.lora_sites}; name some of {', '.join(SITES)}",
        ),
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
    ]


def _distributed_rules(d: DistributedConfig) -> list[Rule]:
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
    ]


def _data_rules(d: DataConfig) -> list[Rule]:
    return [
        (
            d.prompts_per_step % d.prompts_per_row == 0,
            f"data.prompts_per_row = {d.prompts_per_row} must divide data.prompts_per_step = {d.prompts_per_step}",
        ),
        (d.min_shots <= d.max_shots, f"data.min_shots = {d.min_shots} is more than data.max_shots = {d.max_shots}"),
        (
            d.query_length <= d.edge_length,
            f"data.query_length = {d.query_length} is more than data.edge_length = {d.edge_length} holds",
        ),
    ]


def _compressor_rules(config: Config) -> list[Rule]:
    c: CompressorConfig = config.compressor
    return [
        (
            c.substep < 2 or (c.segments - 1) % c.substep > 0,
            f"compressor.segments - 1 = {c.segments - 1} is a multiple of compressor.substep = {c.substep}: the queries"
            " begin a substep, and no answer would teach the summary tokens; change one of them",
        ),
        (
            not METHODS[config.method].edge_prompts or config.data.edge_prompt_length > 0,
            f"data.edge_prompt_length is 0: method {config.method} reads prompts in the edge model's tokens; say how"
            " long they may be",
        ),
    ]


def _method_rules(config: Config) -> list[Rule]:
    g, d, own = config.generator, config.data, config.method == GENERATOR.key
    taught, gated = config.train.reader_prompts > 0, own and g.generator == "meta_tokens"
    return [
        (
            not taught or gated,
            "train.reader_prompts teaches the router of method lora_gen with generator meta_tokens: set it to 0",
        ),
        (
            taught or not g.standardize or config.train.start_from is not None,
            "generator.standardize takes its statistics from train.reader_prompts prompts: set that to a thousand or"
            " more",
        ),
        (
            config.train.inner_steps == 0 or gated,
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
    ]


def _run_rules(config: Config) -> list[Rule]:
    t, e = config.train, config.eval
    readers = [key for key, method in METHODS.items() if method.may_read_prompt]
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
            t.epochs is None or t.steps == 0,
            f"train.epochs is {t.epochs} and train.steps {t.steps}: give one of them; beside epochs set train.steps to"
            " 0, for a number of steps train.epochs to None",
        ),
        (
            (e.refine.kind, e.refine_lora.kind) == ("gates", "lora"),
            f"eval.refine.kind is {e.refine.kind!r}, of methods that train gates, and eval.refine_lora.kind"
            f" {e.refine_lora.kind!r}, of one that trains factors: leave both out",
        ),
        (
            e.split == "test" or not any(name.startswith("lm_eval/") for name in e.tasks),
            "eval.split is validation, but lm_eval/ tasks have a split of their own: leave them out of eval.tasks",
        ),
        (
            not config.data.edge_reads_prompt or set(trained(config)) <= set(readers),
            f"data.edge_reads_prompt is for the methods {', '.join(readers)}; the others' edge model"
            " need not read the prompt: leave it out, or the others (method, compare)",
        ),
    ]
