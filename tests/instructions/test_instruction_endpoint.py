"""The HTTP side: what is sent again, what is left out, and errors that say what to do."""

import email.utils
import json
import socket
import threading
import time

import pytest
from conftest import ROWS, asked, completion, failure
from helpers import unsaid, write_rows

from lora_gen_jax.cli import main
from lora_gen_jax.instructions.settings import chat_url


@pytest.fixture
def run(tmp_path, fake, capsys):
    """Runs the command with more flags; its status and what it says."""
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)

    def ran(*flags):
        out = ["--out", str(tmp_path / "tasks.jsonl")]
        capsys.readouterr()
        try:
            main(
                [
                    "instructions",
                    str(rows),
                    "--endpoint",
                    fake.url,
                    "--model",
                    "tiny",
                    *out,
                    "--concurrency",
                    "1",
                    *flags,
                ]
            )
        except SystemExit as ended:
            return ended.code, capsys.readouterr().err
        return 0, capsys.readouterr().err

    return ran


def finished(tmp_path):
    return len((tmp_path / "tasks.jsonl").read_text().splitlines())


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://h:8000", "http://h:8000/v1/chat/completions"),
        ("http://h:8000/", "http://h:8000/v1/chat/completions"),
        ("https://h/v1/", "https://h/v1/chat/completions"),
        ("https://h/openai/v1/chat/completions?api-version=1", "https://h/openai/v1/chat/completions?api-version=1"),
    ],
)
def test_the_address_may_be_a_server_a_base_or_the_whole_path(url, expected):
    assert chat_url(url) == expected


def test_what_the_endpoint_asks_to_wait_is_waited(tmp_path, fake, run):
    soon = email.utils.formatdate(time.time() + 30, usegmt=True)
    waits = {2: {"Retry-After": "7"}, 3: {"Retry-After": soon}, 4: {"Retry-After": "soon"}}
    fake.answer = lambda body, number: failure(429, "slow down", **waits[number]) if number in waits else None
    assert run()[0] == 0
    first, second, third = fake.pauses
    assert first == 7
    assert 20 < second <= 30
    assert 3 <= third <= 5  # its third failure, with no time that could be read
    assert finished(tmp_path) == 7
    assert len(fake.bodies) == 10


def test_an_endpoint_that_asks_to_wait_for_long_ends_the_work(fake, run):
    fake.answer = lambda body, number: failure(429, "daily limit", **{"Retry-After": "7200"})
    code, said = run()
    assert code == 2
    assert unsaid(said, ["--endpoint", "daily limit", "7200 s"]) == []
    assert not fake.pauses


def test_pauses_between_failures_of_the_server_grow(tmp_path, fake, run):
    fake.answer = lambda body, number: failure(500 + number % 4) if 2 <= number <= 6 else None
    assert run()[0] == 0
    assert len(fake.pauses) == 5
    assert all(0.75 * 2**i <= pause <= 1.25 * 2**i for i, pause in enumerate(fake.pauses))
    assert finished(tmp_path) == 7


def test_a_server_that_stays_broken_ends_the_work_and_finished_rows_are_kept(tmp_path, fake, run):
    fake.answer = lambda body, number: failure(503, "overloaded") if number > 2 else None
    code, said = run("--retries", "2")
    assert code == 2
    facts = [f"--endpoint {fake.url}/v1/chat/completions", "status 503", "overloaded", "3 times"]
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
    assert len(fake.pauses) == len(fake.bodies) - 3


def test_a_refused_connection_is_an_error_at_once(tmp_path, fake, run):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        code, said = run("--endpoint", url)
    assert code == 2
    assert unsaid(said, [f"--endpoint {url}/v1/chat/completions"]) == []
    assert not fake.pauses
    assert not (tmp_path / "tasks.jsonl").exists()


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_names_the_variable_and_never_the_key(fake, run, monkeypatch, status):
    monkeypatch.setenv("MY_KEY", "sk-secret")
    fake.answer = lambda body, number: failure(status, "bad key")
    code, said = run("--api-key-env", "MY_KEY")
    assert code == 2
    assert unsaid(said, [f"status {status}", "bad key", "MY_KEY", "--api-key-env"]) == []
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
    assert unsaid(said, ["status 404", "no such model", "'tiny'", "--model", "--endpoint"]) == []
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
    assert unsaid(said, ["status 302", f"{fake.url}/elsewhere"]) == []
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
    assert unsaid(said, ["--endpoint", "status 400", "messages are not supported"]) == []
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
    assert row == ROWS[5] | {"reason": "the endpoint refused the request with status 400: content filter"}
