"""Agent rows call listed tools with arguments that stand in the edge's part, and no request is in two splits."""

import re
import subprocess
import sys
from collections import Counter
from functools import cache
from itertools import combinations, product

import pytest
from helpers import raises

from lora_gen_jax.data.pocket import agent
from lora_gen_jax.data.pocket.agent import ROWS, Toolset, agent_rows, agent_tasks, split_instruction, toolsets
from lora_gen_jax.data.pocket.tools import REFUSALS, SMALL_TALK, TOOLS, VALUES, Tool
from lora_gen_jax.data.prompts import separator
from lora_gen_jax.data.tasks import normalize, stable_hash
from lora_gen_jax.errors import DataError

Row = dict[str, str]
_BY_NAME = {tool.name: tool for tool in TOOLS}
_CALL = re.compile(r"Thought: Do I need to use a tool\? Yes\nAction: (.+)\nAction Input: (.+)\nObservation:")
_ANSWER = re.compile(r"Thought: Do I need to use a tool\? No\nAI: (.+)")
_LISTED = re.compile(r"^> (?P<tool>.+?): .*?(?P<count>\d) inputs?: (?P<arguments>[a-z, ]+)\.", re.MULTILINE)
_SETS = (*toolsets(True), *toolsets(False))
_ROWS = {(each.id, split): agent_rows(each, split) for each, split in product(_SETS, ROWS)}


def _rows(*splits: str, seen: bool | None = None) -> list[tuple[Toolset, Row]]:
    sets = [each for each in _SETS if seen is None or each.seen == seen]
    return [(each, row) for each in sets for split in splits or ROWS for row in _ROWS[each.id, split]]


def _request(row: Row) -> str:
    return re.findall(r"^New input: (.+)$", row["instruction"], re.MULTILINE)[0]


def _earlier(row: Row) -> list[tuple[str, str]]:
    return re.findall(r"^Human: (.+)\nAI: (.+)$", row["instruction"], re.MULTILINE)


def _called(row: Row) -> Tool | None:
    call = _CALL.fullmatch(row["output"])
    return _BY_NAME[call[1]] if call else None


@cache
def _pattern(template: str) -> re.Pattern[str]:
    """Matches the requests that `template` can make."""
    words = re.split(r"\{(.*?)\}", template)
    words[1::2] = [f"({'|'.join(map(re.escape, VALUES[name]))})" for name in words[1::2]]
    return re.compile("".join(word if i % 2 else re.escape(word) for i, word in enumerate(words)))


def _asked_for(request: str) -> set[str]:
    """The tools one of whose request templates reads like `request`."""
    return {tool.name for tool in TOOLS if any(_pattern(t).fullmatch(request) for t in tool.requests)}


def test_the_tables() -> None:
    assert len(_BY_NAME) == len(TOOLS) >= 30
    for tool in TOOLS:
        assert 1 <= len(tool.arguments) <= 3
        assert len(set(tool.requests)) == len(tool.requests) >= 4
        for template in tool.requests:
            named = set(re.findall(r"\{(.*?)\}", template))
            # Only the file of an earlier turn may be left out of a request.
            left_out = set(tool.arguments) - named
            assert named <= set(tool.arguments)
            assert not left_out or (tool.prerequisite and left_out == {_BY_NAME[tool.prerequisite].returns})
            assert bool(left_out) == bool(re.search(r"\bthat (picture|sound|note)\b", template, re.IGNORECASE))
        if tool.prerequisite:
            assert _BY_NAME[tool.prerequisite].returns in tool.arguments
        assert not tool.returns or tool.returns in VALUES
    assert sum(tool.prerequisite is not None for tool in TOOLS) >= 5
    for seen, least in ((True, 5), (False, 2)):
        counts = Counter(len(tool.arguments) for tool in TOOLS if tool.seen == seen)
        assert min(counts[1], counts[2], counts[3]) >= least
    assert 6 <= sum(not tool.seen for tool in TOOLS) <= 9
    for name, values in VALUES.items():
        assert len(set(values)) == len(values) >= 7, name
        assert all("," not in value and len(value) <= 20 and value == value.strip() for value in values)
    for request, answer in SMALL_TALK:
        assert not set(re.findall(r"\{.*?\}", answer)) - set(re.findall(r"\{.*?\}", request))


def test_toolsets() -> None:
    for seen, count in ((True, 60), (False, 15)):
        sets = toolsets(seen)
        assert sets == toolsets(seen)
        assert len({each.id for each in sets}) == len({frozenset(each.tools) for each in sets}) == count
        for each in sets:
            assert each.seen == seen == all(tool.seen for tool in each.tools)
            assert 3 <= len(set(each.tools)) == len(each.tools) <= 5
            assert all(_BY_NAME[tool.prerequisite] in each.tools for tool in each.tools if tool.prerequisite)
    held = {seen: Counter(tool for each in toolsets(seen) for tool in each.tools) for seen in (True, False)}
    assert all(held[tool.seen][tool] >= (4 if tool.seen else 2) for tool in TOOLS)


def test_unseen_tools_are_in_no_seen_row() -> None:
    unseen = [tool for tool in TOOLS if not tool.seen]
    for _, row in _rows(seen=True):
        assert not any(f"> {tool.name}:" in row["instruction"] for tool in unseen)
        texts = [_request(row), *(request for request, _ in _earlier(row))]
        assert not any(_BY_NAME[name] in unseen for text in texts for name in _asked_for(text))


def test_schema_and_counts() -> None:
    for split, count in ROWS.items():
        for each in _SETS:
            rows = _ROWS[each.id, split]
            assert len(rows) == count
            assert all(set(row) == {"id", "instruction", "input", "output"} and row["input"] == "" for row in rows)
            assert len({normalize(_request(row)) for row in rows}) == count
    assert len({row["id"] for _, row in _rows()}) == len(_rows()) == 75 * 38
    with raises(DataError, "split", "'dev'"):
        agent_rows(_SETS[0], "dev")
    with raises(DataError, "count", "tiny"):
        agent_rows(Toolset("tiny", (_BY_NAME["Call"],), True), "validation", 200)


def test_calls_name_a_listed_tool_and_its_arguments() -> None:
    for each, row in _rows():
        listed = {m["tool"]: m for m in _LISTED.finditer(row["instruction"])}
        assert list(listed) == [tool.name for tool in each.tools]
        call = _CALL.fullmatch(row["output"])
        if call is None:
            assert _ANSWER.fullmatch(row["output"])
            continue
        tool, inputs = _BY_NAME[call[1]], call[2].split(", ")
        assert len(inputs) == int(listed[tool.name]["count"]) == len(tool.arguments)
        assert listed[tool.name]["arguments"] == ", ".join(tool.arguments)
        edge = split_instruction(row["instruction"])[1]
        for name, value in zip(tool.arguments, inputs, strict=True):
            assert value in VALUES[name]
            assert re.search(rf"(?<!\w){re.escape(value)}(?!\w)", edge)
        assert _asked_for(_request(row)) == {tool.name}


def test_a_prerequisite_ran_just_before() -> None:
    checked = 0
    for _, row in _rows():
        tool = _called(row)
        assert len(_earlier(row)) <= 1
        if tool is None or tool.prerequisite is None:
            continue
        maker = _BY_NAME[tool.prerequisite]
        inputs = re.findall("Action Input: (.+)", row["output"])[0].split(", ")
        ((request, answer),) = _earlier(row)
        assert _asked_for(request) == {maker.name}
        assert answer == f"Saved as {inputs[tool.arguments.index(maker.returns)]}."
        # The earlier turn is about the same thing as the new request.
        pairs = zip(tool.arguments, inputs, strict=True)
        assert all(value in request for name, value in pairs if name in maker.arguments)
        checked += 1
    assert checked > 100


def test_negatives() -> None:
    talk = [_pattern(request) for request, _ in SMALL_TALK]
    for split, least, most in (("train", 0.18, 0.22), ("validation", 0.2, 0.3), ("test", 0.18, 0.22)):
        rows = _rows(split)
        negatives = [(each, row) for each, row in rows if _called(row) is None]
        assert least <= len(negatives) / len(rows) <= most
        missing = [(each, row) for each, row in negatives if row["output"].endswith(REFUSALS)]
        assert 0.35 <= len(missing) / len(negatives) <= 0.65
        for each, row in missing:
            asked = _asked_for(_request(row))
            assert len(asked) == 1
            assert not asked & {tool.name for tool in each.tools}
            # The system part says with which words to decline.
            assert f"say: {row['output'].rsplit('AI: ')[1]}\n" in split_instruction(row["instruction"])[0]
        for _, row in negatives:
            small = any(pattern.fullmatch(_request(row)) for pattern in talk)
            assert small != row["output"].endswith(REFUSALS)


def test_rows_use_every_tool_of_their_set() -> None:
    for each in _SETS:
        called = {split: [tool for row in _ROWS[each.id, split] if (tool := _called(row))] for split in ROWS}
        assert set(called["train"]) == set(each.tools)
        scored = {tool for tool in each.tools if each.seen or not tool.seen}
        assert set(called["test"]) == scored
    for seen in (True, False):
        lengths = Counter(len(tool.arguments) for _, row in _rows("test", seen=seen) if (tool := _called(row)))
        assert min(lengths[1], lengths[2], lengths[3]) / lengths.total() > 0.15


def test_no_request_is_in_two_splits() -> None:
    # Earlier turns count too.
    requests: dict[str, set[str]] = {split: set() for split in ROWS}
    for split in ROWS:
        for _, row in _rows(split):
            requests[split] |= {normalize(text) for text in (_request(row), *(text for text, _ in _earlier(row)))}
    for one, other in combinations(ROWS, 2):
        assert not requests[one] & requests[other]
    assert all(agent.split_of(text) == split for split, texts in requests.items() for text in texts)


def test_splits_are_stable(monkeypatch: pytest.MonkeyPatch) -> None:
    every = (*_SETS[:2], *_SETS[-2:])
    for each, split in product(every, ROWS):
        assert agent_rows(each, split, count=ROWS[split] + 3)[: ROWS[split]] == _ROWS[each.id, split]
    before = {normalize(_request(row)): split for split in ROWS for _, row in _rows(split)}
    requests = tuple(
        f"{start} the plant in the {{room}} on {{day}}." for start in ("Water", "Do water", "Now water", "Soak")
    )
    newcomer = Tool("Tend Plant", "tend a plant", ("room", "day"), requests, "", None, True)
    monkeypatch.setattr(agent, "TOOLS", (newcomer, *TOOLS))
    changed = toolsets(True)
    # The newcomer enters some sets; the others stay as they are.
    assert 3 <= sum(newcomer in each.tools for each in changed) <= 25
    assert sum(each in _SETS for each in changed) >= 30
    every = [(split, row) for each in changed[:10] for split in ROWS for row in agent_rows(each, split)]
    after = {normalize(_request(row)): split for split, row in every}
    shared = before.keys() & after.keys()
    assert len(shared) > 50
    assert all(before[text] == after[text] for text in shared)


def test_the_same_rows_in_other_processes() -> None:
    program = (
        "from lora_gen_jax.data.pocket.agent import agent_rows, toolsets\n"
        "from lora_gen_jax.data.tasks import stable_hash\n"
        "print(stable_hash(*(str(agent_rows(s, 'test')) for seen in (True, False) for s in toolsets(seen)[:4])))\n"
    )
    expected = stable_hash(*(str(_ROWS[each.id, "test"]) for each in (*_SETS[:4], *toolsets(False)[:4])))
    for hash_seed in ("1", "2"):
        env = {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": ":".join(sys.path)}
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=env)
        assert result.stdout.strip() == str(expected)


def test_texts_are_short() -> None:
    for _, row in _rows():
        cloud, edge = split_instruction(row["instruction"])
        assert len(cloud.split()) <= 130
        assert len(_request(row).split()) <= 15
        assert len(edge.split()) <= 40
        assert row["instruction"].isascii()


def test_tasks() -> None:
    tasks = agent_tasks()
    assert [(task.name, task.seen) for task in tasks] == [(f"agent/{each.id}", each.seen) for each in _SETS]
    for task, each in zip(tasks, _SETS, strict=True):
        assert task.source == "pocket_agent"
        assert len(set(task.descriptions)) == 3
        assert all(len(text.split()) <= 130 for text in task.descriptions)
        tools = [_LISTED.findall(text) for text in task.descriptions]
        assert tools[0] == tools[1] == tools[2]
        for split, examples in (("train", task.train), ("validation", task.validation), ("test", task.test)):
            for example, row in zip(examples, _ROWS[each.id, split], strict=True):
                assert (example.id, example.response, example.options) == (row["id"], row["output"], ())
                assert f"{task.descriptions[0]}\n{example.query}" == row["instruction"]
                assert separator(example.query, example.response) == "\n"
        assert not task.train_rows_by_key.keys() & task.held_out_keys


def test_split_instruction() -> None:
    for _, row in _rows("validation"):
        cloud, edge = split_instruction(row["instruction"])
        assert f"{cloud}\n{edge}" == row["instruction"]
        assert edge.startswith("Previous conversation:\n")
        assert cloud.split("\n")[1] == "TOOLS:"
    cloud = "Persona.\r\n> A: see the Previous conversation: there"
    edge = "Previous conversation:\r\n\r\nHuman: Hi"
    assert split_instruction(f"{cloud}\r\n\r\n  {edge}\n") == (cloud, edge)
    # The user may write the marker too: the first line is the layout's.
    again = f"{edge}\nNew input: say\nPrevious conversation: none"
    assert split_instruction(f"{cloud}\n{again}") == (cloud, again)
    assert split_instruction(edge) == ("", edge)
    for bad in ("", "New input: hi", "Persona. Previous conversation: none", "previous conversation:\nHuman: hi"):
        with raises(DataError, "instruction", '"Previous conversation:"'):
            split_instruction(bad)
