"""Whether everything that is to be scored fits its model, before anything is scored.

In: models, systems and tasks. Out: nothing, or an error that names task and document. Documents with options are cut
from the left where they are too long, as in lm-eval, and so are not looked at.
"""

from collections.abc import Mapping, Sequence

from lora_gen_jax.config import EvalConfig
from lora_gen_jax.data.tasks import Task
from lora_gen_jax.errors import DataError
from lora_gen_jax.evaluation import answers
from lora_gen_jax.evaluation.systems import METHODS
from lora_gen_jax.evaluation.task import System, asked_of, scored_documents, task_prompt
from lora_gen_jax.inference.prefix import soft_positions
from lora_gen_jax.models import Model, Pair


def check_lengths(pair: Pair, systems: Mapping[str, System], tasks: Sequence[Task], settings: EvalConfig) -> None:
    """Prompts that the cloud model reads, and free-form documents with room for their answers.

    Raises:
        DataError: naming the task or the document, and how many tokens fit.
    """
    room = pair.prompt_room(settings.prompt_limit)
    for task in tasks:
        prompt = task_prompt(task, settings) if any(METHODS.get(name) == "lora_gen" for name in systems) else None
        if prompt is not None and (length := len(pair.cloud.encoder.prompt(prompt.text))) > room:
            raise DataError(
                f"task {task.name}: its prompt with {len(prompt.shots)} shots is {length} cloud tokens, {room} fit",
                field="eval.prompt_limit",
                remedy="lower eval.shots, raise eval.prompt_limit, or take a cloud model with more positions",
            )
        if not scored_documents(task, settings)[0].options:
            for name, system in systems.items():
                check_answers(pair.edge, task, (name, system), settings)


def check_answers(edge: Model, task: Task, named: tuple[str, System], settings: EvalConfig) -> None:
    """Every context of a task without options leaves a system room for the longest answer."""
    name, system = named
    documents, description, shots = asked_of(task, system, settings)
    soft = soft_positions(edge.config, system.soft_tokens)
    room = edge.config.max_positions - soft - answers.answer_limit(edge, documents)
    for document, context in zip(documents, answers.contexts(edge, documents, description, shots), strict=True):
        if len(context) > room:
            raise DataError(
                f"task {task.name}, document {document.id}: for method {name} it is {len(context)} edge tokens,"
                f" {room} fit beside the longest answer",
                field=document.id,
                remedy="shorten it, lower eval.shots, or take a model with more positions",
            )
