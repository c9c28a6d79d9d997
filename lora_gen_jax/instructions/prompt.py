"""What the endpoint is asked. In: rows and a template. Out: messages of a chat.

A template is a text with {rows}, where the rows stand as JSON, and {form}, where the form of the reply is described.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from lora_gen_jax.data.jsonl import read_text
from lora_gen_jax.errors import DataError
from lora_gen_jax.instructions.rows import Source

Message = dict[str, str]

TEMPLATE = """\
You prepare training data for a model that reads the description of a task once and then answers many queries of that \
task. Below is a row of a data set: an instruction, often an input, and the right output. Separate the task from what \
is particular to the row.

"abstract" is the instruction as it would be given for a whole set of such rows: one or two plain sentences in the \
imperative, in the language of the row. It keeps whatever decides the kind and the form of the output: the language, \
the length, the format, labels to choose from. It has none of the row's names, numbers, topics or sentences, and \
neither states nor hints at the output. Similar rows should get the same words.

"query" is what is particular to the row, complete and copied word for word: the output must follow from the abstract \
and the query alone. Where there is an input, it usually is the query, and the instruction usually is abstract \
already: then copy both as they are. Where nothing is particular, make the abstract more general and let the query \
name in a few words what is asked for. The abstract does not repeat the query, and the query does not contain the \
output unless the row's instruction or input does.

Examples:
{"instruction": "Give a synonym of the word 'happy'.", "input": "", "output": "joyful"}
-> {"abstract": "Name a synonym of the word.", "query": "happy"}
{"instruction": "Translate the sentence into French.", "input": "I am late.", "output": "Je suis en retard."}
-> {"abstract": "Translate the sentence into French.", "query": "I am late."}
{"instruction": "Write two sentences about why bees matter.", "input": "", "output": "Bees pollinate crops. …"}
-> {"abstract": "Write two sentences about why something matters.", "query": "bees"}
{"instruction": "Tell me a joke.", "input": "", "output": "Why did the …"}
-> {"abstract": "Write a short text that makes the reader laugh.", "query": "a joke"}

{form}

{rows}
"""

_FORM_OF_ONE = 'Reply with one JSON object and nothing else: {"abstract": "…", "query": "…"}'
_FORM_OF_MANY = (
    'There are several rows, numbered by "row". Reply with one JSON object and nothing else, with an entry for each: '
    '{"rows": [{"row": 1, "abstract": "…", "query": "…"}, …]}'
)
_PLACEHOLDERS = ("{rows}", "{form}")


def read_template(path: Path | None) -> str:
    """The file's text, or the built-in template.

    Raises:
        DataError: when the file cannot be read or lacks a placeholder.
    """
    if path is None:
        return TEMPLATE
    text = read_text(path)
    for name in _PLACEHOLDERS:
        if name not in text:
            raise DataError(
                f"--template {path} has no {name}: {{rows}} is where the rows stand, {{form}} where the reply's form"
                " is described",
                field="--template",
            )
    return text


def first_messages(template: str, sources: Sequence[Source]) -> list[Message]:
    """The conversation that asks for these rows."""
    shown = [source.fields() for source in sources]
    for row in shown:
        row.pop("split", None)
    many = len(sources) > 1
    lines = [json.dumps({"row": n} | row if many else row, ensure_ascii=False) for n, row in enumerate(shown, 1)]
    texts = {"{rows}": "\n".join(lines), "{form}": _FORM_OF_MANY if many else _FORM_OF_ONE}
    # All at once: a row may hold the text {form}.
    text = re.sub(r"\{rows\}|\{form\}", lambda match: texts[match[0]], template)
    return [{"role": "user", "content": text}]


def correction(reply: str, problems: Mapping[int, str], many: bool) -> list[Message]:
    """What is added to the conversation after a reply in which something is wrong.

    Args:
        reply: the endpoint's.
        problems: by the row's number, from 1.
        many: several rows were asked for at first.
    """
    if many:
        named = "; ".join(f"row {number}: {problem}" for number, problem in problems.items())
        numbers = ", ".join(map(str, problems))
        text = f"This cannot be used: {named}. Send the JSON object again, with the rows {numbers} alone."
    else:
        text = f"This cannot be used: {problems[1]}. Send the JSON object again, corrected, and nothing else."
    # Some endpoints refuse empty turns.
    return [{"role": "assistant", "content": reply.strip() or "{}"}, {"role": "user", "content": text}]
