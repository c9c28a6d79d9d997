"""A process that aborts while another of its threads is about to say why."""

import signal
import subprocess
import sys
import time

import pytest

ABORTING = """
import ctypes, os, threading, time
from lora_gen_jax.training.peers import linger_on_abort

def say():
    time.sleep({seconds})
    os.write(2, b"process 0 of 2 was lost")
    os._exit(1)

threading.Thread(target=say, daemon=True).start()
{before}
ctypes.CDLL(None).abort()  # as C++ does: it does not hold the interpreter's lock
"""


def aborted(seconds, before):
    began = time.monotonic()
    script = ABORTING.format(seconds=seconds, before=before)
    done = subprocess.run([sys.executable, "-c", script], stderr=subprocess.PIPE, timeout=60)
    return done.returncode, done.stderr.decode(), time.monotonic() - began


@pytest.mark.parametrize(
    ("seconds", "before", "status", "said"),
    [
        (2, "linger_on_abort()", 1, True),
        (2, "", -signal.SIGABRT, False),
        (30, "linger_on_abort()", -signal.SIGABRT, False),
    ],
)
def test_who_aborts_waits_for_the_message_but_not_forever(seconds, before, status, said):
    code, text, took = aborted(seconds, before)
    assert (code, "was lost" in text) == (status, said)
    assert took < 20
