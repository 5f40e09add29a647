"""A request to stop: which signals ask, which are the same request, and which are left alone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tagger.stop import SAME_REQUEST_S, SIGNALS, StopRequest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals to send to another process")

RUN = (
    "import sys, time; from tagger.stop import StopRequest\n"
    "with StopRequest() as stop:\n"
    "    print('at work', flush=True)\n"
    "    while not stop.requested: time.sleep(0.01)\n"
    "    print('saving', flush=True); time.sleep(float(sys.argv[1]))\n"
    "sys.exit(stop.exit_code)"
)


def started(seconds_to_save: float, *prefix: str) -> subprocess.Popen[bytes]:
    words = [*prefix, sys.executable, "-c", RUN, str(seconds_to_save)]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None and process.stdout.readline() == b"at work\n"
    return process


@pytest.mark.parametrize("number", SIGNALS)
def test_signals_in_quick_succession_are_one_request(number: signal.Signals) -> None:
    with started(0.1) as process:
        for each in (number, number, signal.SIGTERM):
            process.send_signal(each)
            time.sleep(0.05)
        assert process.wait(20) == 128 + number


@pytest.mark.parametrize("number", SIGNALS)
def test_a_later_signal_ends_at_once(number: signal.Signals) -> None:
    with started(60) as process:
        process.send_signal(number)
        assert process.stdout is not None and process.stdout.readline() == b"saving\n"
        process.send_signal(number)
        assert process.wait(20) == -number


def test_a_hangup_that_is_ignored_stays_ignored() -> None:
    with started(0.1, "nohup") as process:
        process.send_signal(signal.SIGHUP)
        time.sleep(0.1)
        assert process.poll() is None
        process.terminate()
        assert process.wait(20) == 128 + signal.SIGTERM


def test_what_is_said_is_what_follows(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("tagger.stop.SAME_REQUEST_S", SAME_REQUEST_S / 100)
    with StopRequest() as stop:
        stop.hold("ending once model/ is written")
        signal.raise_signal(signal.SIGINT)
    assert "SIGINT: ending once model/ is written; once more to end at once" in caplog.text


def test_the_handlers_of_before_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tagger.stop.SAME_REQUEST_S", SAME_REQUEST_S / 100)
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested and stop.exit_code == 128 + signal.SIGTERM
    assert [signal.getsignal(number) for number in SIGNALS] == before
