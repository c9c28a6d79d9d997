"""scripts/abstract_instructions.py against a chat endpoint on this machine."""

import dataclasses
import importlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import experiment, refused, unsaid, write_rows

from lora_gen_jax.data.records import load_records
from lora_gen_jax.models import load_pair
from lora_gen_jax.training.prepare import make_sampler, training_tasks

SCRIPT = Path(__file__).parents[1] / "scripts" / "abstract_instructions.py"

THINGS = ["sun", "moon", "star", "cat", "dog", "bird"]
ROWS = [
    *({"instruction": f"What colour does the {x} have?", "input": "", "output": f"{x} colour"} for x in THINGS),
    {"instruction": "Count the words.", "input": "red green blue", "output": "3"},
]
COLOUR, COUNT = "Name the colour of the thing.", "Count the words."

Answer = tuple[int, dict[str, str], str]


def right(row: dict[str, Any]) -> dict[str, str]:
    """What a good model makes of one of ROWS; the abstract's wording varies in case and punctuation."""
    if row["input"]:
        return {"abstract": row["instruction"], "query": row["input"]}
    thing = row["instruction"].split()[-2]
    return {"abstract": COLOUR if thing in THINGS[::2] else "name the colour of the thing", "query": thing}


def asked(body: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that a request's first message ends with."""
    lines = body["messages"][0]["content"].rstrip("\n").split("\n")
    count = next(n for n, line in enumerate(reversed(lines)) if not line.startswith('{"'))
    return [json.loads(line) for line in lines[len(lines) - count :]]


def completion(content: Any) -> Answer:
    text = content if isinstance(content, str) else json.dumps(content)
    message = {"role": "assistant", "content": text}
    return 200, {}, json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})


def failure(status: int, message: str = "", **headers: str) -> Answer:
    return status, {"retry-after-ms": "1"} | headers, json.dumps({"error": {"message": message}})


class FakeEndpoint:
    """Answers rightly, unless `answer(body, number)` gives another answer; numbers are from 1, in order of arrival."""

    def __init__(self):
        self.bodies: list[dict[str, Any]] = []
        self.heads: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.answer: Callable[[dict[str, Any], int], Answer | None] = lambda body, number: None
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def rows_asked(self) -> list[str]:
        """The instructions of all requests' rows, sorted."""
        return sorted(row["instruction"] for body in self.bodies for row in asked(body))

    def _handler(fake) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with fake.lock:
                    fake.bodies.append(body)
                    fake.heads.append({name.title(): value for name, value in self.headers.items()})
                    fake.paths.append(self.path)
                    number = len(fake.bodies)
                status, headers, text = fake.answer(body, number) or completion(right(asked(body)[0]))
                try:
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Type", "text/html" if text.startswith("<") else "application/json")
                    self.send_header("Content-Length", str(len(text.encode())))
                    self.end_headers()
                    self.wfile.write(text.encode())
                except OSError:
                    pass  # the client has gone

            def log_message(self, format, *args):
                pass

        return Handler


@pytest.fixture(scope="module")
def script():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)
        yield importlib.import_module("abstract_instructions")


@pytest.fixture
def main(script):
    return script.main


@pytest.fixture
def fake(monkeypatch):
    for name in ("OPENAI_API_KEY", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    made = FakeEndpoint()
    thread = threading.Thread(target=made.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield made
    made.server.shutdown()
    made.server.server_close()
    thread.join()


@pytest.fixture
def arguments(tmp_path, fake):
    """Of the command, on ROWS."""
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    out = str(tmp_path / "tasks.jsonl")
    return [str(rows), "--endpoint", fake.url, "--model", "tiny", "--out", out]


def written(tmp_path, name="tasks.jsonl"):
    return [json.loads(line) for line in (tmp_path / name).read_text(encoding="utf-8").splitlines()]


def names(tmp_path):
    return sorted(path.name for path in tmp_path.iterdir())


def test_rows_with_the_same_abstract_instruction_are_one_task(tmp_path, fake, arguments, capsys, main):
    main(arguments)
    rows = written(tmp_path)
    assert [row["input"] for row in rows] == [*THINGS, "red green blue"]
    assert [row["output"] for row in rows] == [row["output"] for row in ROWS]
    assert [row["system"] for row in rows] == [COLOUR] * 6 + [COUNT]
    assert len({row["task"] for row in rows[:6]}) == 1
    assert rows[0]["task"].startswith("name-the-colour-of-the-thing-")
    assert names(tmp_path) == ["rows.jsonl", "tasks.jsonl"]
    assert "7 rows of 2 tasks, 1 with a single row" in capsys.readouterr().err
    assert len(fake.bodies) == 7
    assert fake.paths[0] == "/v1/chat/completions"
    assert fake.bodies[0]["temperature"] == 0
    assert fake.bodies[0]["response_format"] == {"type": "json_object"}


def test_groups_are_drawn_from_the_written_file(tmp_path, fake, arguments, main):
    main(arguments)
    (tmp_path / "in").mkdir()
    config = experiment(tmp_path / "in", tmp_path / "run")
    data = dataclasses.replace(config.data, files=(tmp_path / "tasks.jsonl",), min_shots=0)
    config = dataclasses.replace(config, data=data)
    tasks = training_tasks(config)
    assert {task.descriptions for task in tasks} == {(COLOUR,), (COUNT,)}
    sampler = make_sampler(config, load_pair(config), tasks, "train")
    rng = np.random.default_rng(0)
    groups = [sampler.draw(rng) for _ in range(60)]
    shots = {text: {len(group.shots) for group in groups if group.description == text} for text in (COLOUR, COUNT)}
    assert shots == {COLOUR: {0, 1, 2}, COUNT: {0}}
    assert all(group.queries for group in groups)


def test_replies_in_a_fence_or_after_thoughts_are_read(tmp_path, fake, arguments, main):
    def answer(body, number):
        text = json.dumps(right(asked(body)[0]), indent=1)
        return completion(
            f"<think>{{a}} or {{}}?</think>\nHere {{it}} is:\n```json\n{text}\n```\nDone."
            if number % 2
            else f"```\n{text}```"
        )

    fake.answer = answer
    main(arguments)
    assert [row["system"] for row in written(tmp_path)] == [COLOUR] * 6 + [COUNT]
    assert len(fake.bodies) == 7


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("I cannot.", "the reply is not a JSON object"),
        ('{"abstract": "Name it.", "query": ', "the reply is not a JSON object"),
        ("", "the reply is not a JSON object"),
        ({"abstract": " ", "query": "sun"}, '"abstract" must be a text'),
        ({"abstract": "Name it.", "query": ["sun"]}, '"query" must be a text'),
        ({"abstract": "Name it.", "query": "\ud800"}, "half of a surrogate pair"),
        ({"abstract": "Say: Sun, colour!", "query": "that"}, '"abstract" contains the row\'s output'),
        ({"abstract": "Name the colour of the SUN.", "query": "sun"}, '"abstract" contains the whole "query"'),
        ({"abstract": "Name it.", "query": "sun colour"}, '"query" contains the row\'s output'),
        ({"abstract": "n" * 601, "query": "sun"}, '"abstract" has 601 characters'),
        ({"abstract": "Name it.", "query": "q" * 400}, '"query" is much longer'),
    ],
)
def test_an_unusable_reply_is_asked_for_again_with_what_is_wrong(tmp_path, fake, arguments, reply, reason, main):
    fake.answer = lambda body, number: completion(reply) if number == 1 else None
    main([*arguments, "--limit", "1"])
    assert len(fake.bodies) == 2
    first, given, correction = fake.bodies[1]["messages"]
    assert [first] == fake.bodies[0]["messages"]
    text = reply.strip() if isinstance(reply, str) else json.dumps(reply)
    assert given == {"role": "assistant", "content": text or "{}"}
    assert reason in correction["content"]
    assert [row["input"] for row in written(tmp_path)] == ["sun"]
    assert names(tmp_path) == ["rows.jsonl", "tasks.jsonl"]


def test_a_row_whose_replies_never_serve_is_set_aside_with_the_reason(tmp_path, fake, arguments, capsys, main):
    bad = '{"abstract": "", "query": "moon"}'
    fake.answer = lambda body, number: completion(bad) if "moon" in asked(body)[0]["instruction"] else None
    write_rows(tmp_path / "rows.jsonl", [*ROWS, {"instruction": "Name nothing.", "output": " ", "split": "train"}])
    main([*arguments, "--attempts", "2"])
    assert [row["input"] for row in written(tmp_path)] == ["sun", *THINGS[2:], "red green blue"]
    moon, empty = written(tmp_path, "tasks.rejected.jsonl")
    assert moon == ROWS[1] | {"reason": '"abstract" must be a text that is not empty', "reply": bad}
    assert (empty["reason"], empty["split"]) == ('"output" is empty', "train")
    assert len(fake.bodies) == 8
    assert "2 rows were rejected" in capsys.readouterr().err


def test_where_no_row_comes_out_there_is_no_task_file(tmp_path, fake, arguments, capsys, main):
    fake.answer = lambda body, number: completion("no")
    refused(capsys, main, arguments, "7 rows", "--model")
    assert names(tmp_path) == ["rows.jsonl", "tasks.partial.jsonl", "tasks.rejected.jsonl"]


def test_several_rows_of_a_request_are_answered_together_and_only_wrong_ones_again(tmp_path, fake, arguments, main):
    def answer(body, number):
        rows = [{"row": row["row"], **right(row)} for row in asked(body) if "row" in row]
        if len(body["messages"]) > 1:
            assert "row 2: it is missing" in body["messages"][-1]["content"]
            rows = rows[1:2]
        elif rows and rows[1]["query"] == "moon":
            rows = [rows[2], rows[0]]
        return completion({"rows": rows} if rows else right(asked(body)[0]))

    fake.answer = answer
    main([*arguments, "--rows-per-request", "3"])
    assert [row["input"] for row in written(tmp_path)] == [*THINGS, "red green blue"]
    assert len(fake.bodies) == 4


def test_requests_run_side_by_side_and_the_file_keeps_the_order_of_the_rows(tmp_path, fake, arguments, main):
    together = threading.Barrier(3, timeout=20)

    def answer(body, number):
        if number > 1:
            together.wait()  # six requests, three at a time: fewer would never pass
            time.sleep(0.02 * (number % 3))

    fake.answer = answer
    main([*arguments, "--concurrency", "3"])
    assert [row["input"] for row in written(tmp_path)] == [*THINGS, "red green blue"]
    assert fake.rows_asked() == sorted(row["instruction"] for row in ROWS)


def test_a_killed_command_goes_on_without_asking_for_a_finished_row_again(tmp_path, fake, arguments, capsys, main):
    hold = threading.Event()
    fake.answer = lambda body, number: hold.wait(60) and None if number == 4 else None
    command = [*arguments, "--concurrency", "1"]
    partial = tmp_path / "tasks.partial.jsonl"
    with subprocess.Popen([sys.executable, SCRIPT, *command]) as process:
        deadline = time.monotonic() + 600
        while len(fake.bodies) < 4 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
        process.kill()
    hold.set()
    assert len(partial.read_text().splitlines()) == 4
    with partial.open("a") as file:
        file.write('{"row": 3, "abstr')
    fake.bodies.clear()
    refused(capsys, main, [*command, "--model", "large"], partial, "another --model")
    refused(capsys, main, [*command, "--limit", "6"], partial, "another rows")
    (tmp_path / "mine.txt").write_text("{rows} {form}")
    refused(capsys, main, [*command, "--template", tmp_path / "mine.txt"], partial, "another prompt (--template)")
    assert partial.read_text().endswith('{"row": 3, "abstr')
    assert not fake.bodies
    main(command)
    assert fake.rows_asked() == sorted(row["instruction"] for row in ROWS[3:])
    assert [row["input"] for row in written(tmp_path)] == [*THINGS, "red green blue"]
    assert not partial.exists()


@pytest.fixture
def _interruptible():
    """Ctrl-C as a terminal's programs have it; one that was started in the background is left with none."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
def test_ctrl_c_keeps_what_is_finished(tmp_path, fake, arguments, main):
    hold = threading.Event()

    def answer(body, number):
        if number == 5:
            # As a terminal does it.
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        if number >= 5:
            hold.wait(60)

    fake.answer = answer
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--concurrency", "1"])
    assert ended.value.code == 130
    finished = [json.loads(line)["row"] for line in (tmp_path / "tasks.partial.jsonl").read_text().splitlines()[1:]]
    assert finished == [0, 1, 2, 3]
    fake.answer = lambda body, number: None
    fake.bodies.clear()
    main(arguments)
    hold.set()
    assert fake.rows_asked() == sorted(row["instruction"] for row in ROWS[4:])
    assert [row["input"] for row in written(tmp_path)] == [*THINGS, "red green blue"]


def test_a_file_that_is_no_partial_one_is_left_as_it_is(tmp_path, fake, arguments, capsys, main):
    for text in ("mine", "mine\nand more"):
        (tmp_path / "tasks.partial.jsonl").write_text(text)
        refused(capsys, main, arguments, tmp_path / "tasks.partial.jsonl", "--out")
        assert (tmp_path / "tasks.partial.jsonl").read_text() == text
    assert not fake.bodies


def test_a_damaged_line_of_the_partial_file_is_named(tmp_path, fake, arguments, capsys, main):
    fake.answer = lambda body, number: failure(401) if number == 4 else None
    refused(capsys, main, [*arguments, "--concurrency", "1"], "--api-key-env")
    partial = tmp_path / "tasks.partial.jsonl"
    lines = partial.read_text().splitlines()
    partial.write_text("\n".join([*lines[:2], '{"row": 99}', *lines[3:]]) + "\n")
    refused(capsys, main, arguments, f"{partial}:3")


def test_a_dry_run_prints_the_first_request_and_sends_none(tmp_path, fake, arguments, capsys, monkeypatch, main):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    main([*arguments, "--dry-run"])
    text = capsys.readouterr().out
    shown = json.loads(text)
    assert asked(shown) == [ROWS[0]]
    assert "secret" not in text
    assert not fake.bodies
    assert names(tmp_path) == ["rows.jsonl"]


def test_a_template_of_the_users_own_is_filled_once(tmp_path, fake, arguments, capsys, main):
    mine = tmp_path / "mine.txt"
    mine.write_text("Split {this} up. {form}\n{rows}\n")
    row = {"instruction": "Repeat {form} and {rows}.", "input": "now", "output": "x"}
    write_rows(tmp_path / "rows.jsonl", [row])
    main([*arguments, "--template", str(mine)])
    text = fake.bodies[0]["messages"][0]["content"]
    assert text.startswith('Split {this} up. Reply with one JSON object and nothing else: {"abstract"')
    assert asked(fake.bodies[0]) == [row]
    mine.write_text("Split up: {rows}")
    refused(capsys, main, [*arguments[:-1], tmp_path / "o.jsonl", "--template", mine], f"--template {mine}", "{form}")


@pytest.mark.parametrize(
    ("row", "facts"),
    [
        ({"system": "a", "input": "b", "output": "c"}, ['"system"', "--data.files"]),
        ({"instruction": "a"}, ['"output"']),
        ({"prompt": "a"}, ['"instruction"']),
        ({"instruction": "a", "input": 3, "output": "c"}, ['"input"', "int"]),
        ({"instruction": "a", "output": "\udfff"}, ['"output"', "UTF-8"]),
        ({"instruction": "a", "output": "c", "split": "dev"}, ['"split"', "'dev'"]),
    ],
)
def test_rows_of_another_form_are_named_before_anything_is_asked(tmp_path, fake, arguments, capsys, row, facts, main):
    path = write_rows(tmp_path / "rows.jsonl", [ROWS[0], row])
    refused(capsys, main, arguments, f"{path}:2", *facts)
    assert not fake.bodies


@pytest.mark.parametrize(
    ("flags", "facts"),
    [
        (["--rows-per-request", "0"], [0]),
        (["--endpoint", "localhost:8000"], ["'localhost:8000'"]),
        (["--endpoint", "http://me:key@host/v1"], ["--api-key-env"]),
        (["--out", "tasks.json"], ["tasks.json", ".jsonl"]),
    ],
)
def test_flags_that_cannot_work_are_named(fake, arguments, capsys, flags, facts, main):
    refused(capsys, main, [*arguments, *flags], flags[0], *facts)


def test_outputs_are_never_written_over(tmp_path, fake, arguments, capsys, main):
    for name in ("tasks.jsonl", "tasks.rejected.jsonl"):
        (tmp_path / name).write_text("mine")
        refused(capsys, main, arguments, tmp_path / name, "--out")
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
    assert not fake.bodies


def test_splits_are_kept_and_set_aside_rows_can_be_given_again(tmp_path, fake, arguments, main):
    rows = [row | {"split": split} for row, split in zip(ROWS, ["train"] * 4 + ["test"] * 3, strict=True)]
    write_rows(tmp_path / "rows.jsonl", rows)
    fake.answer = lambda body, number: completion("no") if "bird" in asked(body)[0]["instruction"] else None
    main(arguments)
    colour, count = load_records(tmp_path / "tasks.jsonl")
    assert (len(colour.train), len(colour.test), len(count.test)) == (4, 1, 1)
    fake.answer = lambda body, number: None
    again = [str(tmp_path / "tasks.rejected.jsonl"), *arguments[1:-1], str(tmp_path / "more.jsonl")]
    main(again)
    (bird,) = written(tmp_path, "more.jsonl")
    assert bird == {"task": colour.name, "system": "name the colour of the thing", "input": "bird"} | {
        "output": "bird colour",
        "split": "test",
    }


def test_the_built_in_prompt_has_both_placeholders_and_its_examples_would_pass(script):
    assert script.TEMPLATE.count("{rows}") == script.TEMPLATE.count("{form}") == 1
    lines = script.TEMPLATE.splitlines()
    places = [i for i, line in enumerate(lines) if line.startswith("-> ")]
    assert len(places) == 4
    for i in places:
        _, problems = script.read_reply(lines[i][3:], {1: json.loads(lines[i - 1])}, many=False)
        assert not problems


@pytest.fixture
def run(tmp_path, fake, capsys, main):
    """Runs the command with more flags; its status and what it says."""
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)

    def ran(*flags):
        out = ["--out", str(tmp_path / "tasks.jsonl")]
        capsys.readouterr()
        try:
            main([str(rows), "--endpoint", fake.url, "--model", "tiny", *out, "--concurrency", "1", *flags])
        except SystemExit as ended:
            return ended.code, capsys.readouterr().err
        return 0, capsys.readouterr().err

    return ran


def finished(tmp_path):
    return len((tmp_path / "tasks.jsonl").read_text().splitlines())


@pytest.mark.parametrize("path", ["", "/v1", "/v1/", "/v1/chat/completions"])
def test_the_address_may_be_a_server_a_base_or_the_whole_path(fake, run, path):
    assert run("--endpoint", fake.url + path, "--limit", "1")[0] == 0
    assert fake.paths == ["/v1/chat/completions"]


def test_temporary_failures_are_asked_again(tmp_path, fake, run):
    fake.answer = lambda body, number: failure((429, 500, 503, 408)[number % 4]) if 2 <= number <= 6 else None
    assert run()[0] == 0
    assert finished(tmp_path) == 7
    assert len(fake.bodies) == 12


def test_an_endpoint_that_asks_to_wait_for_long_ends_the_work(fake, run):
    fake.answer = lambda body, number: failure(429, "daily limit", **{"retry-after-ms": "", "Retry-After": "7200"})
    code, said = run()
    assert code == 2
    assert unsaid(said, ["--endpoint", "daily limit"]) == []
    assert len(fake.bodies) == 1


def test_a_server_that_stays_broken_ends_the_work_and_finished_rows_are_kept(tmp_path, fake, run):
    fake.answer = lambda body, number: failure(503, "overloaded") if number > 2 else None
    code, said = run("--retries", "2")
    assert code == 2
    facts = [f"--endpoint {fake.url}", 503, "overloaded"]
    assert unsaid(said, facts) == []
    assert len(fake.bodies) == 5
    fake.answer = lambda body, number: None
    fake.bodies.clear()
    assert run()[0] == 0
    assert len(fake.bodies) == 5
    assert finished(tmp_path) == 7


def test_a_silent_endpoint_is_asked_again(tmp_path, fake, run):
    hold = threading.Event()
    fake.answer = lambda body, number: hold.wait(60) and None if number == 2 else None
    assert run("--timeout", "1", "--limit", "3")[0] == 0
    hold.set()
    assert finished(tmp_path) == 3
    assert fake.rows_asked().count(ROWS[1]["instruction"]) >= 2


def test_a_refused_connection_is_an_error(tmp_path, fake, run):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        code, said = run("--endpoint", url)
    assert code == 2
    assert unsaid(said, [f"--endpoint {url}"]) == []
    assert not (tmp_path / "tasks.jsonl").exists()


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_names_the_variable_and_never_the_key(fake, run, monkeypatch, status):
    monkeypatch.setenv("MY_KEY", "sk-secret")
    fake.answer = lambda body, number: failure(status, "bad key")
    code, said = run("--api-key-env", "MY_KEY")
    assert code == 2
    assert unsaid(said, [status, "bad key", "MY_KEY", "--api-key-env"]) == []
    assert "sk-secret" not in said
    assert fake.heads[0]["Authorization"] == "Bearer sk-secret"
    assert unsaid(run()[1], ["OPENAI_API_KEY", "--api-key-env"]) == []
    assert "Authorization" not in fake.heads[-1]
    assert len(fake.bodies) == 2


def test_the_keys_usual_variable_is_read_unless_told_otherwise(fake, run, monkeypatch, tmp_path):
    monkeypatch.setenv("OPENAI_API_KEY", " sk-usual\n")
    run("--limit", "1")
    (tmp_path / "tasks.jsonl").unlink()
    run("--limit", "1", "--api-key-env", "")
    assert [head.get("Authorization") for head in fake.heads] == ["Bearer sk-usual", None]
    monkeypatch.setenv("OPENAI_API_KEY", "sk\nwrong")
    code, said = run("--limit", "2")
    assert code == 2
    assert unsaid(said, ["OPENAI_API_KEY", "--api-key-env"]) == []
    assert "wrong" not in said


def test_an_unknown_model_is_named(fake, run):
    fake.answer = lambda body, number: failure(404, "no such model")
    code, said = run()
    assert code == 2
    assert unsaid(said, [404, "no such model", "'tiny'", "--model", "--endpoint"]) == []
    assert len(fake.bodies) == 1


def test_a_page_instead_of_a_completion_is_an_error_at_once(fake, run):
    fake.answer = lambda body, number: (200, {}, "<html>Welcome</html>")
    code, said = run()
    assert code == 2
    assert unsaid(said, ["--endpoint", "'<html>Welcome</html>'"]) == []
    assert len(fake.bodies) == 1


def test_a_redirect_is_not_followed_with_the_key(fake, run, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    fake.answer = lambda body, number: (302, {"Location": f"{fake.url}/elsewhere"}, "")
    code, said = run()
    assert code == 2
    assert unsaid(said, ["--endpoint", 302]) == []
    assert len(fake.bodies) == 1


def test_fields_that_the_endpoint_refuses_are_left_out_from_then_on(tmp_path, fake, run):
    def answer(body, number):
        if "response_format" in body:
            return failure(400, "unsupported")
        if "temperature" in body:
            return failure(422, "only the default temperature is supported")
        if "max_tokens" in body:
            return failure(400, "use max_completion_tokens instead of max_tokens")
        return None

    fake.answer = answer
    assert run()[0] == 0
    assert finished(tmp_path) == 7
    assert [sorted(body) for body in fake.bodies[3:]] == [["messages", "model"]] * 7


def test_a_request_that_is_refused_with_all_fields_left_out_ends_the_work(fake, run):
    fake.answer = lambda body, number: failure(400, "messages are not supported")
    code, said = run()
    assert code == 2
    assert unsaid(said, ["--endpoint", 400, "messages are not supported"]) == []
    assert len(fake.bodies) == 2


def test_a_row_that_the_endpoint_refuses_later_is_set_aside_alone(tmp_path, fake, run):
    def answer(body, number):
        rows = asked(body)
        if any("bird" in row["instruction"] for row in rows):
            return failure(400, "content filter")
        if len(rows) == 1:
            return None
        return completion(
            {"rows": [{"abstract": "Name the colour.", "query": row["instruction"].split()[-2]} for row in rows]}
        )

    fake.answer = answer
    assert run("--rows-per-request", "2")[0] == 0
    assert finished(tmp_path) == 6
    (row,) = map(json.loads, (tmp_path / "tasks.rejected.jsonl").read_text().splitlines())
    reason = row.pop("reason")
    assert row == ROWS[5]
    assert unsaid(reason, [400, "content filter"]) == []
