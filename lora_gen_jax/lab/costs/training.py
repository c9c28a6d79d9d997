"""What a training step costs on eight queries that share an instruction: LoRA-Gen as published, grouped, and LoRA.

In: a config, its pair of models and the sizes of instruction and input. Out: seconds, memory and multiply-adds of one
step by method, as plain numbers. Token ids are random: the cost depends only on their number.

"lora_gen" reads the instruction once for every query, as the paper's implementation does; "lora_gen_grouped" reads it
once for all queries that share it, which is how this project trains; "lora" reads instruction and input on the edge.
"""

import dataclasses
import statistics
import time
from typing import Any

import jax
import numpy as np

from lora_gen_jax.config import Config
from lora_gen_jax.data.pipeline import Batch, Group, pack_groups
from lora_gen_jax.errors import ConfigError
from lora_gen_jax.lab.costs.measure import ms, peak_bytes, say
from lora_gen_jax.methods.registry import BASELINE, GENERATOR, make_generator
from lora_gen_jax.models import Pair
from lora_gen_jax.training.cost import method_cost
from lora_gen_jax.training.optimizer import make_optimizer
from lora_gen_jax.training.prepare import keep_freed_memory
from lora_gen_jax.training.step import init_state, make_train_step

QUERIES = 8
# Of a query's tokens this share is the answer that is learned from.
ANSWER_SHARE = 4


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to train on the same queries.

    Attributes:
        method: of the config.
        prompts: into which the queries are grouped, each read once by the cloud.
        reads_prompt: the edge reads the instruction before each query.
    """

    method: str
    prompts: int
    reads_prompt: bool = False


GROUPED = f"{GENERATOR.key}_grouped"
CASES = {
    GENERATOR.key: Case(GENERATOR.key, prompts=QUERIES),
    GROUPED: Case(GENERATOR.key, prompts=1),
    BASELINE.key: Case(BASELINE.key, prompts=QUERIES, reads_prompt=True),
}


def training_costs(config: Config, pair: Pair, instruction: int, query: int, repeats: int) -> dict[str, Any]:
    """Seconds, bytes and MACs of a step, by name of case; the cases take turns."""
    if query < ANSWER_SHARE or instruction + query > pair.edge.config.max_positions:
        raise ConfigError(
            f"a training step on {instruction} + {query} tokens is not possible: the input needs {ANSWER_SHARE}"
            f" tokens or more, and the edge has {pair.edge.config.max_positions} positions",
            field="--input-tokens",
            remedy="change --instruction-tokens or --input-tokens, or pass --no-training",
        )
    keep_freed_memory()
    prepared, result = {}, {}
    for name, case in CASES.items():
        say(f"training step of {name}: compiling")
        prepared[name], result[name] = prepare(config, pair, case, (instruction, query))
    seconds: dict[str, list[float]] = {name: [] for name in prepared}
    for turn in range(repeats + 1):
        say(f"training steps, turn {turn} of {repeats}")
        for name, (step, state, batch) in prepared.items():
            began = time.perf_counter()
            state, metrics = step(state, pair.frozen, batch)
            jax.block_until_ready(metrics)
            prepared[name] = (step, state, batch)
            if turn:
                seconds[name].append(time.perf_counter() - began)
    for name, times in seconds.items():
        result[name] |= {"step_ms": ms(statistics.median(times)), "step_ms_range": [ms(min(times)), ms(max(times))]}
    return result


def prepare(config: Config, pair: Pair, case: Case, sizes: tuple[int, int]) -> tuple[Any, dict[str, Any]]:
    """(compiled step, state, batch) and the step's memory and MACs."""
    config = dataclasses.replace(config, method=case.method)
    batch = make_batch(config, pair, case, sizes)
    generator, optimizer = make_generator(config, pair), make_optimizer(config.train)
    state = init_state(generator, optimizer, pair.frozen, batch, config.train.seed)
    step = make_train_step(generator, pair.edge.decoder, optimizer, config)
    compiled = step.lower(state, pair.frozen, batch).compile()
    cost = method_cost(config, pair.cloud.config, pair.edge.config, batch)
    measured = {
        "prompts": case.prompts,
        "queries": QUERIES,
        "cloud_tokens": 0 if case.reads_prompt else int(np.sum(batch.prompts.positions_BT >= 0)),
        "edge_tokens": int(np.sum(batch.positions_PT >= 0)),
        "macs": cost.total,
        "peak_bytes": peak_bytes(compiled),
        "trained_parameters": sum(x.size for x in jax.tree.leaves(state.params)),
    }
    return (compiled, state, batch), measured


def make_batch(config: Config, pair: Pair, case: Case, sizes: tuple[int, int]) -> Batch:
    """`QUERIES` queries of `sizes` = (instruction, input) tokens, without any padding."""
    (instruction, query), rng = sizes, np.random.default_rng(0)

    def ids(count: int, model: Any) -> list[int]:
        return rng.integers(0, len(model.encoder.tokenizer), count).tolist()

    answer = query // ANSWER_SHARE
    read = query - answer + 1 + (instruction if case.reads_prompt else 0)
    each = QUERIES // case.prompts
    groups = [
        Group("", (), ids(instruction, pair.cloud), [(ids(read, pair.edge), ids(answer, pair.edge))] * each)
        for _ in range(case.prompts)
    ]
    layers = pair.edge.config.num_layers
    data = dataclasses.replace(
        config.data,
        prompts_per_step=case.prompts,
        prompts_per_row=1,
        cloud_length=instruction + layers,
        edge_length=each * (read + answer - 1),
        queries_per_prompt=each,
        response_slots=each * answer,
    )
    return pack_groups(groups, data, layers)
