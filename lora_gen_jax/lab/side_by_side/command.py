"""``lora-gen side_by_side``: the base model with the whole prompt beside the specialized model without (Figure 4).

In: a generator, and a prompt with an input, or nothing for two built-in cases: a tool request and a role. Out: a table
for each case on the screen, and JSON when a file is named.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_gen_jax.data.prompts import behind
from lora_gen_jax.errors import DataError, OutputError
from lora_gen_jax.lab.side_by_side.cases import Case, built_in_cases

# After a run that compiles; the best counts, as other work on the machine only adds.
REPEATS = 5


@dataclasses.dataclass(frozen=True)
class SideBySide:
    """Shows what the base model answers with the whole prompt, and the specialized model without it, with both times.

    Left out, the prompts are a tool request and a role-play. Examples:

    lora-gen side_by_side --checkpoint quickstart

    lora-gen side_by_side --prompt @prompt.txt --input "Where do owls live?"
    """

    checkpoint: Path | None = None
    """A run's work directory, one checkpoints/<step> directory, or a generator that `pack` wrote; left out, the
    generator that is shipped for SmolLM2-135M."""
    prompt: str | None = None
    """The system prompt, or @FILE to read it from a file."""
    input: str | None = None
    """What follows the prompt, or @FILE to read it from a file."""
    max_new_tokens: int = 48
    """Longest answer in tokens."""
    chat: bool = False
    """Put prompt and input into the edge model's chat template, as the system's and the user's turn."""
    json: Path | None = None
    """File to write everything to, beside the tables on the screen."""


@dataclasses.dataclass(frozen=True)
class Side:
    """One model's answer.

    Attributes:
        answer: its text.
        finish: "stop", or "length" where the limit cut it.
        context_tokens, new_tokens: what the edge model read and wrote.
        first_token_ms: from the context to the first token (the prefill).
        answer_ms: from the context to the last token.
    """

    answer: str
    finish: str
    context_tokens: int
    new_tokens: int
    first_token_ms: float
    answer_ms: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Both answers of a case, and what is done once for its prompt.

    Attributes:
        base, specialized: with the prompt in the context, and without.
        prompt_tokens: what the cloud model read.
        cloud_ms, merge_ms: the cloud's pass with meta tokens and router; merging into the edge model.
    """

    case: Case
    base: Side
    specialized: Side
    prompt_tokens: int
    cloud_ms: float
    merge_ms: float

    @property
    def pays_after(self) -> float | None:
        """Queries whose saved prefill is worth the specialization; None where none is saved."""
        saved = self.base.first_token_ms - self.specialized.first_token_ms
        return (self.cloud_ms + self.merge_ms) / saved if saved > 0 else None


def side_by_side_command(flags: SideBySide) -> None:
    """Checks what costs nothing first, then loads the models and answers."""
    from lora_gen_jax.evaluation.run import describe, machine
    from lora_gen_jax.files import write_json
    from lora_gen_jax.lab.side_by_side.table import print_comparison
    from lora_gen_jax.methods.registry import GENERATOR
    from lora_gen_jax.training.checkpoint import check_method, load_checkpoint, versions
    from lora_gen_jax.training.portable import DEFAULT

    given = given_case(flags)
    loaded = load_checkpoint(flags.checkpoint or DEFAULT)
    check_method(loaded, GENERATOR.key)
    cases = built_in_cases(loaded.config) if given is None else [given]
    sides = Sides(loaded, flags.max_new_tokens, flags.chat)
    compared = []
    for case in cases:
        compared.append(sides.compare(case))
        print_comparison(compared[-1])
    if flags.json is not None:
        found = {"checkpoint": describe(loaded), "edge": loaded.config.edge.source, "chat": flags.chat}
        found |= {"machine": machine(), "versions": versions()}
        write_json(flags.json, found | {"cases": [dataclasses.asdict(one) for one in compared]}, "--json")


def given_case(flags: SideBySide) -> Case | None:
    """The case of --prompt and --input; None for the built-in ones."""
    from lora_gen_jax.files import text_argument

    if flags.max_new_tokens < 1:
        raise DataError(f"--max-new-tokens is {flags.max_new_tokens}; at least 1", field="--max-new-tokens")
    if flags.json is not None and (flags.json.is_dir() or not flags.json.absolute().parent.is_dir()):
        remedy = "name a file in a directory that exists"
        raise OutputError(f"--json {flags.json} cannot be written", field="--json", code="unwritable", remedy=remedy)
    if flags.prompt is None and flags.input is None:
        return None
    if flags.prompt is None or flags.input is None:
        problem = "give both --prompt and --input, or neither for the built-in cases"
        raise DataError(problem, field="--input" if flags.input is None else "--prompt", code="missing")
    return Case("prompt", text_argument(flags.prompt, "--prompt"), text_argument(flags.input, "--input"))


class Sides:
    """A generator with its models, ready to answer.

    Args:
        loaded: the checkpoint of a method lora_gen.
        max_new_tokens: longest answer.
        chat: use the edge model's chat template.
    """

    def __init__(self, loaded: Any, max_new_tokens: int, chat: bool):
        from lora_gen_jax.methods.registry import make_generator
        from lora_gen_jax.models import load_pair
        from lora_gen_jax.training.checkpoint import check_models

        self.loaded, self.max_new_tokens, self.chat = loaded, max_new_tokens, chat
        self.pair = load_pair(loaded.config)
        check_models(loaded.fingerprints, self.pair.fingerprints, f"checkpoint {loaded.path}")
        self.generator = make_generator(loaded.config, self.pair)

    def compare(self, case: Case) -> Comparison:
        """Specializes for the case's prompt, then answers with both models.

        Raises:
            DataError: for a prompt or an input that does not fit a model.
            ModelError: with `chat`, where the edge model has no chat template.
        """
        from lora_gen_jax.adapters.merge import merge
        from lora_gen_jax.evaluation.timing import best_of
        from lora_gen_jax.generator.specialize import specialize

        base, limit = self.pair.edge.params, self.loaded.config.eval.prompt_limit
        whole, alone = self.contexts(case)
        ids = self.pair.cloud.encoder.prompt(case.prompt)

        def read() -> Any:
            made = specialize(self.generator, self.loaded.variables, self.pair.cloud.params, [ids], limit)
            return made.adapter.select(0)

        adapter, reading = best_of(read, REPEATS)
        params, merging = best_of(lambda: merge(base, adapter), REPEATS)
        left, right = self.answers([(base, whole), (params, alone)])
        return Comparison(case, left, right, len(ids), 1000 * reading, 1000 * merging)

    def contexts(self, case: Case) -> tuple[list[int], list[int]]:
        """Ids of prompt and input together, and of just the input."""
        encoder = self.pair.edge.encoder
        if not self.chat:
            asked = case.input.rstrip()
            return encoder.text(behind(case.prompt.rstrip(), asked)), encoder.text(asked)
        import jinja2

        user = {"role": "user", "content": case.input}
        try:
            return encoder.chat([{"role": "system", "content": case.prompt}, user]), encoder.chat([user])
        except jinja2.TemplateError as error:
            problem = f"the edge model's chat template cannot say this ({error})"
            remedy = "leave --chat out, for models that know no system turn"
            raise DataError(problem, field="--chat", remedy=remedy) from error

    def answers(self, sides: Sequence[tuple[Any, list[int]]]) -> list[Side]:
        """Answers of several (weights, context); they take turns, so that a slow moment of the machine hits all."""
        from lora_gen_jax.evaluation.timing import timed
        from lora_gen_jax.inference.decode import GenerationSettings, generate, stream
        from lora_gen_jax.models import end_ids

        edge = self.pair.edge
        settings = GenerationSettings(self.max_new_tokens, end_ids(self.loaded.config.edge.source, edge))
        models = [(edge.plain.replace(params=params), ids) for params, ids in sides]
        turns: list[list[tuple[float, float, Any]]] = [[] for _ in sides]
        for _ in range(REPEATS + 1):
            for (model, ids), times in zip(models, turns, strict=True):
                _, until_first = timed(lambda m=model, x=ids: next(stream(m, [x], settings), None))
                made, until_last = timed(lambda m=model, x=ids: generate(m, [x], settings))
                times.append((until_first, until_last, made[0]))
        found = []
        for (_, ids), times in zip(models, turns, strict=True):
            first, total, made = zip(*times[1:], strict=True)  # the first turn compiles
            text = edge.encoder.decode(made[-1].ids)
            sizes = (len(ids), len(made[-1].ids))
            found.append(Side(text, made[-1].finish, *sizes, 1000 * min(first), 1000 * min(total)))
        return found
