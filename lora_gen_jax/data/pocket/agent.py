"""The embedded agent tasks. In: the tools of `tools`. Out: rows in GPT4Tools' schema, and a `Task` per toolset.

An instruction tells the cloud LM which tools there are and how to call one, then asks the edge LM for the next call:

    persona ⏎ TOOLS: … ⏎ the two formats ⏎ file-name rule ⏎ Previous conversation: … ⏎ New input: … ⏎ closing line

Nothing here is random: every choice goes by a hash. The split of a request is a hash of only its own text, so new
tools, toolsets or rows move no request to another split.
"""

import re
from dataclasses import dataclass

from lora_gen_jax.data.pocket.tools import REFUSALS, TOOLS, Tool, choose_values, fill, pick, small_talk
from lora_gen_jax.data.tasks import Example, Task, normalize, stable_hash
from lora_gen_jax.errors import DataError

SOURCE = "pocket_agent"
ROWS = {"train": 24, "validation": 4, "test": 10}
"""Rows of a toolset, by split."""
SEEN_TOOLSETS, UNSEEN_TOOLSETS = 60, 15
MARKER = "Previous conversation:"
"""Starts the line from which on the edge LM reads an instruction."""
_CLOSING = "Now write the next lines."
_TEST_PERCENT, _VALIDATION_PERCENT = 26, 12
_NEGATIVE_EVERY, _NEGATIVE_AT = 5, 3
_ATTEMPTS = 20_000
_BY_NAME = {tool.name: tool for tool in TOOLS}
_MARKER_LINE = re.compile(rf"^[ \t]*{re.escape(MARKER)}", re.MULTILINE)
# Persona | head of the format with a tool | head of the format without one | rule for file names.
_WORDINGS = """
You are Pip, a helper with tools. | To call a tool, write: | If no tool is needed, write: | Copy file names.
Max helps people with tools. | A tool is called like this: | A plain answer is: | Write file names just as they are.
You help a user with tools. | Use this form for a tool: | Use this form for an answer: | Keep file names as given.
You pick the right tool. | With a tool, write these lines: | With no tool, write: | Never change a file name.
""".strip().splitlines()
_SYSTEM = """{persona}
TOOLS:
{tools}
{call}
Thought: Do I need to use a tool? Yes
Action: tool name
Action Input: inputs, with commas
Observation: result
{answer}
Thought: Do I need to use a tool? No
AI: answer
If no tool fits, say: {refusal}
{rule}"""


@dataclass(frozen=True)
class Toolset:
    """The tools of one assistant.

    Attributes:
        id: "seen-07" or "unseen-07".
        tools: in the order in which the instruction lists them; prerequisites are among them.
        seen: whether all of them are tools that training may use.
    """

    id: str
    tools: tuple[Tool, ...]
    seen: bool


@dataclass(frozen=True)
class _Dialogue:
    """What a row is made of: at most one earlier (request, answer), the new request, and the gold output."""

    earlier: tuple[tuple[str, str], ...]
    request: str
    output: str


def toolsets(seen: bool) -> list[Toolset]:
    """The 60 seen toolsets, or the 15 unseen ones, which hold at least one unseen tool each; three to five tools."""
    return [_toolset(seen, i) for i in range(SEEN_TOOLSETS if seen else UNSEEN_TOOLSETS)]


def agent_rows(toolset: Toolset, split: str, count: int | None = None) -> list[dict[str, str]]:
    """The "train", "validation" or "test" rows of a toolset: id, instruction, input (always empty), output.

    A fifth needs no tool or asks for one that is not listed. The other ones take turns over all tools; in the test
    rows of unseen toolsets over the unseen tools. No request comes twice, and none is in two splits of any toolset.

    Args:
        count: how many rows; those of a smaller count come first. By default as many as `ROWS` says.

    Raises:
        DataError: for an unknown split, or where there are fewer different requests than rows.
    """
    if split not in ROWS:
        raise DataError(f"unknown split {split!r}; it must be one of {', '.join(ROWS)}", field="split")
    cloud = _cloud_text(toolset, 0)
    rows: list[dict[str, str]] = []
    used: set[str] = set()
    for i in range(ROWS[split] if count is None else count):
        dialogue = _dialogue(toolset, split, i, used)
        used.add(normalize(dialogue.request))
        row = {"id": f"{toolset.id}/{split}/{i}", "instruction": f"{cloud}\n{_edge_text(dialogue)}", "input": ""}
        rows.append({**row, "output": dialogue.output})
    return rows


def agent_tasks() -> list[Task]:
    """One `Task` per toolset: queries are the edge's parts of its rows, descriptions the cloud's in three wordings.

    Seen ones come first. `descriptions[0]` has the wording of the rows.
    """
    return [_task(toolset) for seen in (True, False) for toolset in toolsets(seen)]


def split_instruction(instruction: str) -> tuple[str, str]:
    """Cuts an instruction of GPT4Tools' layout at the first line that starts with "Previous conversation:".

    Returns what the cloud LM reads, the text before that line, and what the edge LM reads, the text from that line
    on; both stripped. Raises DataError where there is no such line.
    """
    found = _MARKER_LINE.search(instruction)
    if found is None:
        raise DataError(
            f'the instruction has no line that starts with "{MARKER}"', field="instruction", code="no marker"
        )
    return instruction[: found.start()].strip(), instruction[found.start() :].strip()


def split_of(request: str) -> str:
    """The split that a request belongs to, in every toolset."""
    place = stable_hash("agent split", normalize(request)) % 100
    if place < _TEST_PERCENT:
        return "test"
    return "validation" if place < _TEST_PERCENT + _VALIDATION_PERCENT else "train"


def refusal(toolset: Toolset) -> str:
    """What the assistant says where none of its tools does what is asked; its system part names it."""
    return pick(REFUSALS, toolset.id, "refusal")


def _toolset(seen: bool, index: int) -> Toolset:
    name = f"{'seen' if seen else 'unseen'}-{index:02d}"
    size = 3 + stable_hash(name, "size") % 3
    # Every tool has its own rank, so that a new tool enters the sets where it ranks high and leaves the others alone.
    ranked = sorted(TOOLS, key=lambda tool: stable_hash(name, tool.name))
    unseen = [tool for tool in TOOLS if not tool.seen]
    # Unseen tools are few, so they take turns: each is scored in about as many toolsets.
    wanted = [] if seen else [unseen[index % len(unseen)], next(tool for tool in ranked if not tool.seen)]
    chosen: list[Tool] = []
    for tool in (*wanted, *(tool for tool in ranked if tool.seen)):
        needed = [_BY_NAME[tool.prerequisite], tool] if tool.prerequisite else [tool]
        added = [tool for tool in needed if tool not in chosen]
        if len(chosen) + len(added) <= size:
            chosen += added
    return Toolset(name, tuple(sorted(chosen, key=lambda tool: stable_hash(name, "order", tool.name))), seen)


def _task(toolset: Toolset) -> Task:
    return Task(
        name=f"agent/{toolset.id}",
        descriptions=tuple(_cloud_text(toolset, wording) for wording in range(3)),
        train=[_example(row) for row in agent_rows(toolset, "train")],
        validation=[_example(row) for row in agent_rows(toolset, "validation")],
        test=[_example(row) for row in agent_rows(toolset, "test")],
        source=SOURCE,
        seen=toolset.seen,
    )


def _example(row: dict[str, str]) -> Example:
    return Example(row["id"], split_instruction(row["instruction"])[1], row["output"])


def _cloud_text(toolset: Toolset, wording: int) -> str:
    first = stable_hash(toolset.id, "wording")
    persona, call, answer, rule = _WORDINGS[(first + wording) % len(_WORDINGS)].split(" | ")
    tools = "\n".join(map(_tool_line, toolset.tools))
    return _SYSTEM.format(persona=persona, tools=tools, call=call, answer=answer, refusal=refusal(toolset), rule=rule)


def _tool_line(tool: Tool) -> str:
    count = len(tool.arguments)
    gives = f" Gives: {tool.returns}." if tool.returns else ""
    return f"> {tool.name}: {tool.usage}. {count} input{'s' * (count > 1)}: {', '.join(tool.arguments)}.{gives}"


def _edge_text(dialogue: _Dialogue) -> str:
    earlier = (f"Human: {request}\nAI: {answer}" for request, answer in dialogue.earlier)
    return "\n".join((MARKER, *earlier, f"New input: {dialogue.request}", _CLOSING))


def _dialogue(toolset: Toolset, split: str, index: int, used: set[str]) -> _Dialogue:
    """The first attempt at row `index` whose requests all belong to `split`, and whose new one is not `used`."""
    for attempt in range(_ATTEMPTS):
        dialogue = _attempt(toolset, split, index, f"{toolset.id}/{split}/{index}/{attempt}")
        earlier = [request for request, _ in dialogue.earlier]
        if dialogue.request in earlier or normalize(dialogue.request) in used:
            continue
        if all(split_of(request) == split for request in (dialogue.request, *earlier)):
            return dialogue
    problem = f"toolset {toolset.id} has fewer than {index + 1} different {split} requests"
    raise DataError(problem, field="count", remedy="ask for fewer rows")


def _attempt(toolset: Toolset, split: str, index: int, salt: str) -> _Dialogue:
    """Row `index` in the draw of `salt`. The kind of the row and its tool follow from `index`."""
    turn = stable_hash(toolset.id, split)
    if index % _NEGATIVE_EVERY == _NEGATIVE_AT:
        # Small talk and missing tools take turns.
        talk = (turn + index // _NEGATIVE_EVERY) % 2 == 0
        request, answer = small_talk(salt) if talk else (_missing_request(toolset, salt), refusal(toolset))
        return _Dialogue(_earlier(toolset, salt), request, f"Thought: Do I need to use a tool? No\nAI: {answer}")
    only_unseen = split == "test" and not toolset.seen
    tools = [tool for tool in toolset.tools if not (only_unseen and tool.seen)]
    calls_before = index - (index + _NEGATIVE_EVERY - 1 - _NEGATIVE_AT) // _NEGATIVE_EVERY
    return _tool_call(toolset, tools[(turn + calls_before) % len(tools)], salt)


def _tool_call(toolset: Toolset, tool: Tool, salt: str) -> _Dialogue:
    values = choose_values(tool.arguments, salt, {})
    earlier = _earlier(toolset, salt)
    if tool.prerequisite:
        # The earlier turn speaks of the same things: "Paint me a cat." before "Make the cat in that picture blue."
        earlier = (_finished_turn(_BY_NAME[tool.prerequisite], f"{salt}/maker", values),)
    request = fill(pick(tool.requests, salt, "request"), values)
    inputs = ", ".join(values[name] for name in tool.arguments)
    output = f"Thought: Do I need to use a tool? Yes\nAction: {tool.name}\nAction Input: {inputs}\nObservation:"
    return _Dialogue(earlier, request, output)


def _earlier(toolset: Toolset, salt: str) -> tuple[tuple[str, str], ...]:
    """A turn that the new request does not refer to, in a third of all draws: small talk, or a finished call."""
    kind = stable_hash(salt, "earlier") % 6
    if kind == 0:
        return (small_talk(f"{salt}/earlier"),)
    tools = [tool for tool in toolset.tools if not tool.prerequisite]
    return (_finished_turn(pick(tools, salt, "earlier tool"), f"{salt}/earlier", {}),) if kind == 1 else ()


def _finished_turn(tool: Tool, salt: str, given: dict[str, str]) -> tuple[str, str]:
    """A request for `tool` and what the assistant said when it was done; `given` values are kept."""
    names = (*tool.arguments, tool.returns) if tool.returns else tool.arguments
    values = choose_values(names, salt, given)
    answer = f"Saved as {values[tool.returns]}." if tool.returns else "Done."
    return fill(pick(tool.requests, salt, "request"), values), answer


def _missing_request(toolset: Toolset, salt: str) -> str:
    """A request for a tool that is not listed; never for an unseen one in a seen toolset."""
    # Not for one with a prerequisite: its file would come from an earlier turn that nobody could have answered.
    tools = [tool for tool in TOOLS if (tool.seen or not toolset.seen) and not tool.prerequisite]
    tools = [tool for tool in tools if tool not in toolset.tools]
    return _finished_turn(pick(tools, salt, "missing"), salt, {})[0]
