"""Tasks of lm-evaluation-harness inside eval.py, by the same methods as ours.

In: a pair of models, checkpoints and names ``lm_eval/<task>``. Out: results by method and task, as for our own tasks.
The base and the LoRA read queries alone, in-context learning the task's description and shots before each, LoRA-Gen
reads them once; shots are the same for all documents. Latency is not measured here.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from lora_gen_jax.config import Config
from lora_gen_jax.errors import ConfigError
from lora_gen_jax.evaluation.request_cache import RequestCache
from lora_gen_jax.evaluation.subject import Subject, end_ids, identity_of
from lora_gen_jax.evaluation.systems import identifier, multi_task, prompt_specializer
from lora_gen_jax.models import Pair
from lora_gen_jax.training.checkpoint import Loaded

PREFIX = "lm_eval/"
# A task's figure that stands as `acc`: the first of these that it has, else its first.
MAIN_METRICS = ("acc", "exact_match")


def check_harness(methods: Sequence[str], names: Sequence[str]) -> None:
    """What can be told before anything is loaded.

    Raises:
        ConfigError: when lm-eval is not installed or lacks a task, or for a method that cannot run its tasks.
    """
    if not names:
        return
    if "shuffled" in methods:
        raise ConfigError("method shuffled gives each task another's prompt, which lm_eval/ tasks cannot have")
    _manager(names, {})


def _manager(names: Sequence[str], metadata: dict[str, str]) -> Any:
    """lm-eval's index of tasks: of ours alone where these are enough, as that of all takes seconds."""
    try:
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise ConfigError("lm-eval is not installed: pip install 'lora_gen_jax[eval]'") from error
    from lora_gen_jax.evaluation.lm_eval_documents import TASKS

    wanted = {name.removeprefix(PREFIX) for name in names}
    for all_of_them in (False, True):
        manager = TaskManager(include_path=str(TASKS), include_defaults=all_of_them, metadata=dict(metadata))
        if not (missing := wanted - set(manager.all_tasks)):
            return manager
    raise ConfigError(f"lm-eval knows no task {min(missing)!r}; `lora-gen lm_eval ls tasks` lists them")


def harness_scores(
    config: Config, pair: Pair, checkpoints: dict[str, Loaded], names: Sequence[str], journal: RequestCache
) -> dict[str, dict[str, dict]]:
    """{method: {task: result}}; finished requests are kept in `journal`.

    Raises:
        DataError: where the contexts of a task do not begin with a prompt that LoRA-Gen could read.
    """
    from lm_eval.evaluator import simple_evaluate

    from lora_gen_jax.evaluation.lm_eval_model import LoraGenLM
    from lora_gen_jax.evaluation.lm_eval_prompts import fixed_shots

    d = config.data
    given = {"data_dir": d.dir, "tfds_dir": d.tfds_dir}
    manager = _manager(names, {name: str(path) for name, path in given.items() if path is not None})
    scored: dict[str, dict[str, dict]] = {}
    for method in config.eval.methods:
        subject = _subject(method, config, pair, checkpoints)
        model: Any = LoraGenLM.of(subject, journal, config.eval.batch_tokens)  # pyright: ignore
        for name in names:
            with fixed_shots():
                found: Any = simple_evaluate(
                    model,
                    tasks=[name.removeprefix(PREFIX)],
                    num_fewshot=config.eval.shots if method in ("icl", "lora_gen") else 0,
                    limit=config.eval.limit,
                    task_manager=manager,
                    bootstrap_iters=100,
                )
            tokens = model.context_tokens()
            results = found["results"]
            # A name may stand for several tasks.
            for task, metrics in results.items():
                if count := found["n-samples"].get(task):
                    own = task if len(results) > 1 else name.removeprefix(PREFIX)
                    scored.setdefault(method, {})[PREFIX + own] = result_of(metrics, count["effective"], tokens)
    return scored


def result_of(metrics: dict[str, Any], count: int, context_tokens: float) -> dict[str, Any]:
    """A task's entry in results.json, from lm-eval's metrics (``acc,none``: figure and filter)."""
    numbers = {k.split(",")[0]: v for k, v in metrics.items() if "," in k and isinstance(v, int | float)}
    main = next((m for m in MAIN_METRICS if m in numbers), next((m for m in numbers if "_stderr" not in m), None))
    if main is None:
        raise ConfigError(f"a task has no figure that could be compared; it gives {', '.join(metrics)}")
    return {
        "acc": float(numbers[main]),
        "acc_norm": float(numbers.get("acc_norm", numbers[main])),
        "stderr": float(numbers.get(f"{main}_stderr", 0.0)),
        "n": count,
        "context_tokens": round(context_tokens, 1),
        "latency_ms": None,
        "metric": main,
    }


def _subject(method: str, config: Config, pair: Pair, checkpoints: dict[str, Loaded]) -> Subject:
    ends, edge = end_ids(config.edge.source, pair.edge), pair.edge
    if method in ("base", "icl"):
        return Subject(identity_of(edge, {"method": "base"}), lambda: edge, ends)
    loaded = checkpoints[method]
    identify = identifier(pair, loaded)
    if method == "lora":
        return Subject(identify(""), lambda: dataclasses.replace(edge, params=multi_task(pair, loaded)), ends)
    make = prompt_specializer(config, pair, loaded)

    def specialise(prompt: str) -> Subject:
        return Subject(identify(prompt), lambda: dataclasses.replace(edge, params=make(prompt)), ends)

    return Subject(identify(""), lambda: edge, ends, specialise=specialise)
