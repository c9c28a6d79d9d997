"""A few hundred hostile requests, the same in every run: none is answered with an error of the server, none for long.

`python scripts/fuzz_requests.py` sends as many as it is told.
"""

import functools
import importlib
import sys
from pathlib import Path

import httpx
import pytest
from serving_tools import KEY, say_at_once, serving

from lora_gen_jax.serving.guard import Connection
from lora_gen_jax.serving.service import Limits, Service

SCRIPTS = str(Path(__file__).parents[2] / "scripts")


@pytest.fixture(scope="module")
def scripts():
    """The two scripts as modules."""
    sys.path.insert(0, SCRIPTS)
    try:
        yield importlib.import_module("hostile_requests"), importlib.import_module("fuzz_requests")
    finally:
        sys.path.remove(SCRIPTS)


def test_hostile_requests_do_no_harm(scripts, specializer, registry_of, puppet, tmp_path, caplog):
    service = Service(say_at_once(puppet), specializer, registry_of(999, tmp_path / "store"), Limits(), KEY)
    making, sending = scripts
    with serving(service, http=functools.partial(Connection, waiting={}), limit_concurrency=64) as url:
        address = ("127.0.0.1", httpx.URL(url).port)
        outcomes = [sending.send(address, case) for case in making.hostile(210, seed=1, key=KEY)]
        assert [(one.case.kind, one.wrong, one.case.sent[:200]) for one in outcomes if one.wrong] == []
        ask = {"model": "red", "prompt": "sun", "max_tokens": 2}
        answer = httpx.post(f"{url}/v1/completions", json=ask, headers={"Authorization": f"Bearer {KEY}"})
        assert answer.json()["choices"][0]["finish_reason"] == "stop"
    assert {one.status for one in outcomes} >= {400, 403, 413, 415}
    assert "Traceback" not in caplog.text
    assert [path.name for path in tmp_path.iterdir()] in ([], ["store"])
    service.close()


def test_a_seed_gives_the_same_requests(scripts):
    first, again, other = (list(scripts[0].hostile(70, seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert len({case.kind for case in first}) == 7
