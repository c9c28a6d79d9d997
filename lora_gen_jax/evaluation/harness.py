"""Tasks of lm-evaluation-harness inside eval.py, by the same methods as ours.

In: a pair of models, checkpoints and names ``lm_eval/<task>``. Out: results by method and task, as for our own tasks.
A method whose edge model reads the prompt reads the task's description and shots before each query, one that depends on
the prompt once, the others never; shots are the same for all documents. Latency is not measured here.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from lora_gen_jax.config import Config
from lora_gen_jax.data.reasoning import REASONING_TASKS
from lora_gen_jax.errors import ConfigError, DataError
from lora_gen_jax.evaluation.controls import CONTROLS
from lora_gen_jax.evaluation.lm_eval_source import with_method
from lora_gen_jax.evaluation.request_cache import RequestCache
from lora_gen_jax.evaluation.subject import EvaluatedModel, identity_of
from lora_gen_jax.methods.registry import BASE, METHODS
from lora_gen_jax.models import Pair, end_ids
from lora_gen_jax.training.checkpoint import Loaded

PREFIX = "lm_eval/"
# A task's figure that stands as `acc`: the first of these that it has, else its first.
MAIN_METRICS = ("acc", "exact_match")


def check_harness(methods: Sequence[str], names: Sequence[str]) -> None:
    """What can be told before anything is loaded.

    Raises ConfigError when lm-eval is not installed or lacks a task, or for a method that cannot run its tasks.
    """
    if not names:
        return
    for method in methods:
        if method in CONTROLS:
            problem = f"method {method} gives each task another prompt, which lm_eval/ tasks cannot have"
            raise ConfigError(problem, field="eval.methods")
        if method in METHODS and METHODS[method].needs_shots:
            problem = f"method {method} needs a task's shots apart, which lm_eval/ tasks give only as text"
            raise ConfigError(problem, field="eval.methods")
    _manager(names, {})


def _manager(names: Sequence[str], metadata: dict[str, Any]) -> Any:
    """lm-eval's index of tasks: of just ours where these are enough, as that of all takes seconds."""
    try:
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        remedy = "pip install 'lora_gen_jax[eval]'"
        raise ConfigError("lm-eval is not installed", field="lm-eval", remedy=remedy) from error
    from lora_gen_jax.evaluation.lm_eval_documents import TASKS

    wanted = {name.removeprefix(PREFIX) for name in names}
    for all_of_them in (False, True):
        manager = TaskManager(include_path=str(TASKS), include_defaults=all_of_them, metadata=dict(metadata))
        if not (missing := wanted - set(manager.all_tasks)):
            return manager
    problem = f"lm-eval knows no task {min(missing)!r}; `lora-gen lm_eval ls tasks` lists them"
    raise ConfigError(problem, field="eval.tasks")


def harness_scores(
    config: Config, pair: Pair, checkpoints: dict[str, Loaded], names: Sequence[str], journal: RequestCache
) -> dict[str, dict[str, dict]]:
    """{method: {task: result}}; finished requests are kept in `journal`.

    Raises DataError for a task whose prompt cannot be told from its queries, or one without a figure between 0 and 1
    that is better when higher.
    """
    from lm_eval.evaluator import simple_evaluate

    from lora_gen_jax.evaluation.lm_eval_documents import use_fixed_shots
    from lora_gen_jax.evaluation.lm_eval_model import LoraGenLM

    use_fixed_shots()
    # For the task definitions that read local files: the same shots and descriptions as our own evaluation.
    given = {"data_dir": config.data.dir, "tfds_dir": config.data.tfds_dir}
    paths = {name: str(path) for name, path in given.items() if path is not None}
    manager = _manager(names, {**paths, "shots_seed": config.eval.seed, "descriptions": True})
    # A name may stand for several tasks.
    tasks = {task: one for name in names for task, one in manager.load([name.removeprefix(PREFIX)])["tasks"].items()}
    unprompted = [task for task, one in tasks.items() if not (config.eval.shots or one.config.description)]
    scored: dict[str, dict[str, dict]] = {}
    for method in config.eval.methods:
        subject = _subject(method, config, pair, checkpoints)
        model: Any = LoraGenLM.of(subject, journal, config.eval.batch_tokens, unprompted)  # pyright: ignore
        for task in tasks:
            found: Any = simple_evaluate(
                model,
                tasks=[task],
                # All methods are asked alike; those that do not read the prompt drop it.
                num_fewshot=config.eval.shots,
                limit=config.eval.limit,
                task_manager=manager,
                bootstrap_iters=100,
                fewshot_random_seed=config.eval.seed,
            )
            result = result_of(task, found["results"][task], found["higher_is_better"][task])
            result |= {"n": found["n-samples"][task]["effective"], "context_tokens": round(model.context_tokens(), 1)}
            scored.setdefault(method, {})[PREFIX + task] = result
    return scored


def seen_of(name: str) -> bool | None:
    """Whether generators are trained on an lm-eval task: None for one that is none of the eight reasoning tasks."""
    own = name.removeprefix(PREFIX).removeprefix("lora_gen_")
    return REASONING_TASKS[own].seen if own in REASONING_TASKS else None


def result_of(task: str, metrics: dict[str, Any], higher_is_better: dict[str, Any]) -> dict[str, Any]:
    """A task's entry in results.json, from lm-eval's metrics: of ``acc,none`` and others the first counts."""
    figures: dict[str, Any] = {}
    for key, value in metrics.items():
        name, comma, _ = key.partition(",")
        if comma and isinstance(value, int | float):
            figures.setdefault(name, float(value))
    shares = [name for name, value in figures.items() if higher_is_better.get(name) and 0 <= value <= 1]
    main = next((name for name in (*MAIN_METRICS, *shares) if name in shares), None)
    if main is None:
        problem = f"lm_eval/{task} has no figure between 0 and 1 that is better when higher ({', '.join(figures)})"
        remedy = "take it out of the tasks, and run it with `lora-gen lm_eval`"
        raise DataError(problem, field="eval.tasks", remedy=remedy)
    return {
        "acc": figures[main],
        "acc_norm": figures.get("acc_norm", figures[main]),
        "stderr": figures.get(f"{main}_stderr"),
        "latency_ms": None,
        "metric": main,
    }


def _subject(method: str, config: Config, pair: Pair, checkpoints: dict[str, Loaded]) -> EvaluatedModel:
    ends, edge = end_ids(config.edge.source, pair.edge), pair.edge
    base, one = EvaluatedModel(identity_of(edge, {"method": BASE.key}), edge, None, ends), METHODS[method]
    if one.edge_reads_prompt:
        return base
    if (loaded := checkpoints.get(method)) is None:  # the edge model as it is, which reads no prompt
        return dataclasses.replace(base, specialize=lambda prompt: base)
    made = with_method(config, pair, loaded)
    # An edge model that was trained to read the prompt reads it like any text.
    reads = one.depends_on_prompt or loaded.config.data.edge_reads_prompt
    return made if reads else dataclasses.replace(made, specialize=lambda text: made)
