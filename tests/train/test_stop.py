"""A request to stop is heard at any moment, and a second one ends the process at once."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PROGRAM = """
import hashlib, time
from biomamba_jax.train.stop import StopRequest
with StopRequest() as stop:
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"a", b"b", {rounds})  # as a compiler, it lets no Python run in this thread
    if {waits}:
        time.sleep(0.5)
        print(stop.requested, flush=True)
print("left", flush=True)
"""


def program(rounds, waits):
    text = PROGRAM.format(rounds=rounds, waits=waits)
    started = subprocess.Popen([sys.executable, "-c", text], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert started.stdout.readline() == b"ready\n"
    return started


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_only_asks(number):
    running = program(1, True)
    running.send_signal(number)
    out, err = running.communicate(timeout=60)
    assert (out.decode().split(), err, running.returncode) == ([number.name, "left"], b"", 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_ends_a_process_that_is_compiling(number):
    running = program(10**9, False)
    running.send_signal(number)
    time.sleep(1.5)
    assert running.poll() is None
    running.send_signal(number)
    _, err = running.communicate(timeout=10)
    assert running.returncode == 128 + number
    assert err.decode().splitlines() == [f"{number.name} again: ended at once; the checkpoints before stay"]


def test_one_request_of_a_scheduler_may_arrive_twice():
    running = program(1, True)
    for _ in range(2):
        running.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    assert running.communicate(timeout=60)[0].decode().split() == ["SIGTERM", "left"]
    assert running.returncode == 0
