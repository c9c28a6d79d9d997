"""``lora-gen side_by_side``: the base model with the whole prompt beside the specialized model without (Figure 4).

In: a generator, and a prompt with an input, or nothing for two built-in cases: a tool request and a role. Out: a table
for each case on the screen, and JSON when a file is named.
"""

import dataclasses
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_gen_jax.config import Config
from lora_gen_jax.data.prompts import behind
from lora_gen_jax.errors import DataError, OutputError
from lora_gen_jax.evaluation.sheet import Cell, Sheet, number, ratio, to_screen


@dataclasses.dataclass(frozen=True)
class Case:
    """What is asked.

    Attributes:
        name: title of its table.
        prompt: what the cloud model reads; the base model reads it before the input.
        input: what both edge models read.
        remark: what to know before judging the answers.
    """

    name: str
    prompt: str
    input: str
    remark: str = ""


_TOOL_REQUEST = """\
You are Iris, an assistant that works on pictures and documents with tools. You cannot see a picture yourself.
TOOLS:
> Describe Picture: tells what a picture shows. One input: the file of the picture.
> Remove Background: cuts the main thing out of a picture. One input: the file of the picture. Gives: a new file.
> Turn Into Painting: paints a picture in a style. Two inputs, with a comma: the file, the style. Gives: a new file.
> Translate Text: puts a text into another language. Two inputs, with a comma: the language, the text.
> Weather Forecast: tells tomorrow's weather. One input: the place.
To use a tool, write:
Thought: Do I need to use a tool? Yes
Action: the name of the tool
Action Input: its inputs, with commas
Observation: what the tool said
If no tool is needed, write:
Thought: Do I need to use a tool? No
AI: your answer
Write file names exactly as they are given, and never invent one.
Previous conversation:
Human: I have put a photo of my garden into pictures/garden.png.
AI: Thank you, I have received pictures/garden.png.
New input: Please tell me what can be seen on pictures/garden.png.
Now write the next lines."""
_ROLE = """\
You are Mirabel Thorne, captain of the mail boat between three small islands. You are seventy, warm and a little proud,
you speak in short sentences, you call everybody "my dear", and you bring every talk back to your boat, the Blue Heron.
You have never left the islands and know nothing of computers. Answer as Mirabel would, in at most three sentences."""
_GUEST = "Guest: Captain, were you never afraid of a storm?\nMirabel Thorne:"
_ZOO_ROLE = "You are a zoo guide. Name the baby of each animal, in square brackets."


def built_in_cases(config: Config) -> list[Case]:
    """A tool request and a role-play prompt for the models of this config."""
    from lora_gen_jax.data.pocket.agent import agent_rows, split_instruction, toolsets

    pocket = config.edge.source.startswith("pocket-")
    # The first row that any test scores: not chosen by what the models make of it.
    row = agent_rows(toolsets(seen=True)[0], "test", 1)[0]
    instruction = row["instruction"] if pocket else _TOOL_REQUEST
    tools = Case("a tool request", *split_instruction(instruction), remark=remark(config))
    role = Case("a role", _ZOO_ROLE, "owl:") if pocket else Case("a role", _ROLE, _GUEST)
    return [tools, dataclasses.replace(role, remark=remark(config, tools=False))]


def remark(config: Config, tools: bool = True) -> str:
    """What the generator was trained on, and whether tool calls were among it."""
    names = [*config.data.tasks, *(path.name for path in config.data.files)]
    text = f"The generator was trained on {', '.join(names)} in {config.train.steps} steps."
    called = config.data.files or any("agent" in name for name in names)
    return text if called or not tools else f"{text} None of these calls tools: a right call would be a surprise."


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


WIDTH = 110
# The last lines of a long prompt say least about it.
_SHOWN_LINES = 6
_ROWS = ("base model, reads prompt and input", "specialized model, reads the input alone")


def print_comparison(found: Comparison) -> None:
    """The prompt, both answers, and what they cost."""
    case, sides = found.case, (found.base, found.specialized)
    print(f"\n{case.name}\n\n{textwrap.indent(shown_prompt(case.prompt), '  ')}\n\ninput:")
    print(textwrap.indent(case.input.strip(), "  "))
    for title, side in zip(_ROWS, sides, strict=True):
        print(f"\n{title}:\n{textwrap.indent(shown_answer(side), '  ')}")
    print()
    to_screen(comparison_sheet(found), width=WIDTH)
    saved = found.pays_after
    once = found.cloud_ms + found.merge_ms
    lines = (
        f"Once for this prompt: {once:.1f} ms; the cloud model reads {found.prompt_tokens} tokens"
        f" ({found.cloud_ms:.1f} ms), its experts are merged ({found.merge_ms:.1f} ms).",
        "The prefill saves nothing."
        if saved is None
        else f"The saved prefill makes up for it after {saved:.1f} queries.",
        "Times: best of five, after a run that compiles; an answer takes longer the longer it is.",
        case.remark,
    )
    print(textwrap.fill(" ".join(line for line in lines if line), WIDTH))


def comparison_sheet(found: Comparison) -> Sheet:
    """What both models read, wrote and took, and the first over the second."""
    left, right = found.base, found.specialized
    rows: list[Sequence[Cell]] = []
    for title, side in zip(_ROWS, (left, right), strict=True):
        times = (number(side.first_token_ms, 2), number(side.answer_ms, 2))
        rows.append((title, number(side.context_tokens, 0), *times, number(side.new_tokens, 0)))
    pairs = ("context_tokens", "first_token_ms", "answer_ms")
    rows.append(("ratio", *(ratio(getattr(left, key), getattr(right, key), 2) for key in pairs), None))
    columns = ("", "edge context,\ntokens", "first token, ms", "answer, ms", "answer, tokens")
    return Sheet("What the edge model reads and writes", columns, rows)


def shown_answer(side: Side) -> str:
    """The answer, marked where the limit cut it or where there is none."""
    text = side.answer.strip()
    if not text:
        return "(nothing: it ends at once)" if side.finish == "stop" else "(blank)"
    return text + (" …" if side.finish == "length" else "")


def shown_prompt(prompt: str) -> str:
    """The first lines of the prompt."""
    lines = prompt.strip().splitlines()
    left_out = len(lines) - _SHOWN_LINES
    return "\n".join(lines[:_SHOWN_LINES]) + (f"\n… {left_out} more lines" if left_out > 0 else "")
