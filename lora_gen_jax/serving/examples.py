"""Examples in requests: what a server learns from, beside what it reads.

In: checked requests, and turns of conversations. Out: prompts with examples, and how they are learned from.
"""

import hashlib
import json

from lora_gen_jax.data.prompt_sources import prompt_of, solved_rows
from lora_gen_jax.data.record_rows import text_field
from lora_gen_jax.errors import DataError
from lora_gen_jax.serving.errors import api_error, invalid
from lora_gen_jax.serving.requests import NewSpecialization, as_turns
from lora_gen_jax.specialization.prompt import Prompt
from lora_gen_jax.specialization.settings import RefineConfig
from lora_gen_jax.specializer import Specializer

_MOST_CHARACTERS = 65536  # of examples: learning from them takes several times as long as reading


def requested_prompt(request: NewSpecialization) -> str | Prompt:
    """What a request wants a specialization of."""
    given = request.model_dump(include={"prompt", "shots", "description"}, exclude_none=True)
    row = given | ({"messages": as_turns(request.messages)} if "messages" in request.model_fields_set else {})
    if request.examples is None:
        for name in ("refine", "steps", "as_chat"):
            if getattr(request, name):
                raise DataError(f'"{name}" is about "examples"', field=name, remedy="give them, or leave it out")
        return prompt_of(row)
    if len(row) > 1 or not row.keys() <= {"prompt", "description"}:
        problem = '"examples" go with "description" or "prompt" only'
        raise DataError(problem, field="examples", code="count", remedy="leave the others out")
    description = text_field(row, next(iter(row))) if row else ""
    return Prompt(description, solved_rows(request.examples, "example"), request.as_chat)


def refinement_of(
    prompt: str | Prompt, specializer: Specializer, rank: int, request: NewSpecialization | None = None
) -> RefineConfig | None:
    """How a prompt's examples are learned from; None where it has none, or no steps are asked for.

    Args:
        prompt: with examples, or a text.
        specializer: that reads it.
        rank: of the factors that a row has room for.
        request: that asks for a kind and a number of steps; None for a conversation.
    """
    if isinstance(prompt, str) or (request is not None and request.steps == 0):
        return None
    characters = sum(len(shot.query) + len(shot.response) for shot in prompt.shots)
    if characters > _MOST_CHARACTERS:
        message = f"the examples have {characters} characters, the limit is {_MOST_CHARACTERS}: give fewer"
        raise invalid(message, "messages" if request is None else "examples")
    config = specializer.refinement() if request is None else specializer.refinement(request.refine, request.steps)
    if config.kind == "lora" and config.rank > rank:
        message = f"refine is lora, but this server was started without --refined-rank {config.rank}: use gates"
        raise invalid(message, "refine", "unsupported_value")
    return config


def learned_turns(system: str, turns: list[dict[str, str]]) -> Prompt:
    """A conversation whose turns before the last are examples; the last waits for its answer."""
    roles = [turn["role"] for turn in turns]
    if roles != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        message = "turns_as_examples needs a user's and the assistant's turns one after another, the last a user's"
        raise invalid(message, "messages")
    texts = [turn["content"] for turn in turns]
    try:
        return Prompt(system, list(zip(texts[:-1:2], texts[1::2], strict=True)), chat=True)
    except DataError as error:
        raise api_error(error, "messages") from error


def digest(prompt: str | Prompt) -> str:
    """16 hex digits of a system message, and of examples behind it."""
    text = prompt
    if isinstance(prompt, Prompt):
        text = json.dumps([prompt.description, *((shot.query, shot.response) for shot in prompt.shots)])
    return hashlib.sha256(str(text).encode()).hexdigest()[:16]
