"""What the endpoint answered. In: a reply's text and the rows it is for. Out: outcomes, or what is wrong with them.

A reply may stand in a Markdown fence, between other words, or after a <think> part.
"""

import json
from collections.abc import Mapping
from typing import Any

from lora_gen_jax.data.record_rows import check_text
from lora_gen_jax.data.tasks import normalize
from lora_gen_jax.errors import DataError
from lora_gen_jax.instructions.rows import Outcome, Source

MAX_ABSTRACT = 600
"""Characters of an abstract instruction, where the row's own instruction is not longer."""
_QUERY_SLACK = 100
"""Characters that a query may be longer than its row: a few words of the model's own, not an essay."""
_BRACES = 20
"""Places where an object may begin: words around it may hold braces, too."""
_CHOICES = {"yes": "no", "no": "yes", "true": "false", "false": "true"}


def read_reply(text: str, sources: Mapping[int, Source], many: bool) -> tuple[dict[int, Outcome], dict[int, str]]:
    """(outcomes, problems), each by the row's number; together they have all numbers of `sources`.

    Args:
        text: the reply.
        sources: the rows still asked for, by their number from 1.
        many: several rows were asked for at first, so that the reply lists them under "rows".
    """
    try:
        found = _entries(_object(text), sources, many)
    except DataError as error:
        return {}, dict.fromkeys(sources, str(error))
    outcomes: dict[int, Outcome] = {}
    problems: dict[int, str] = {}
    for number, source in sources.items():
        try:
            if number not in found:
                raise DataError('it is missing in "rows"', field="rows", code="missing")
            outcomes[number] = _checked(found[number], source)
        except DataError as error:
            problems[number] = str(error)
    return outcomes, problems


def _object(text: str) -> dict[str, Any]:
    """The first JSON object in the text."""
    text = text.rpartition("</think>")[2]
    decoder, start = json.JSONDecoder(), text.find("{")
    for _ in range(_BRACES):
        if start < 0:
            break
        try:
            return decoder.raw_decode(text, start)[0]
        except (ValueError, RecursionError):
            start = text.find("{", start + 1)
    raise DataError("the reply is not a JSON object", field="reply", code="json")


def _entries(value: dict[str, Any], sources: Mapping[int, Source], many: bool) -> dict[int, Any]:
    if not many:
        return {1: value}
    rows = value.get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError('the reply has no list "rows" of objects', field="rows", code="type")
    if not any("row" in row for row in rows) and len(rows) == len(sources):
        return dict(zip(sources, rows, strict=True))
    numbers = [row.get("row") for row in rows]
    if any(not isinstance(number, int) or isinstance(number, bool) for number in numbers):
        raise DataError('an entry of "rows" has no number "row"', field="rows.row", code="missing")
    if len(set(numbers)) < len(numbers):
        raise DataError('two entries of "rows" have the same number "row"', field="rows.row", code="repeated")
    return {row["row"]: row for row in rows}


def _checked(entry: Any, source: Source) -> Outcome:
    """The entry's outcome.

    Raises:
        DataError: that says to the model what is wrong.
    """
    texts: dict[str, str] = {}
    for name in ("abstract", "query"):
        value = entry.get(name)
        if not isinstance(value, str) or not value.strip():
            raise DataError(f'"{name}" must be a text that is not empty', field=name, code="text")
        check_text(value, name)
        texts[name] = value.strip()
    abstract, query = texts["abstract"], texts["query"]
    given = f"{source.instruction}\n{source.input}"
    longest = max(MAX_ABSTRACT, len(source.instruction))
    if len(abstract) > longest:
        raise DataError(
            f'"abstract" has {len(abstract)} characters, at most {longest} are allowed',
            field="abstract",
            code="too long",
        )
    if len(query) > len(given) + _QUERY_SLACK:
        raise DataError(
            '"query" is much longer than the row\'s instruction and input together', field="query", code="too long"
        )
    if contains(abstract, query):
        raise DataError(
            '"abstract" contains the whole "query", which is particular to the row',
            field="abstract",
            code="contains query",
        )
    # Labels to choose from stand in the instruction, and belong into the abstract one.
    if contains(abstract, source.output) and not contains(source.instruction, source.output):
        other = _CHOICES.get(normalize(source.output))
        if other is None or not contains(abstract, other):
            raise DataError('"abstract" contains the row\'s output', field="abstract", code="contains output")
    if contains(query, source.output) and not contains(given, source.output):
        raise DataError(
            '"query" contains the row\'s output, which its instruction and input do not',
            field="query",
            code="contains output",
        )
    return Outcome(abstract=abstract, query=query)


def contains(text: str, part: str) -> bool:
    """Whether the words of `part` stand in `text`, whatever their case and the punctuation between them.

    Single letters are not looked for: they are articles, or letters of options.
    """
    text, part = normalize(text), normalize(part)
    if len(part) == 1 and _spaced(part) and not part.isdigit():
        return False
    start = text.find(part)
    while start >= 0:
        end = start + len(part)
        inside = start > 0 and _spaced(text[start - 1]) and _spaced(part[0])
        inside |= end < len(text) and _spaced(text[end]) and _spaced(part[-1])
        if not inside:
            return True
        start = text.find(part, start + 1)
    return False


def _spaced(character: str) -> bool:
    """Whether words of this script have spaces between them; those without upper case are looked for anywhere."""
    return character.isdigit() or character.lower() != character.upper()
