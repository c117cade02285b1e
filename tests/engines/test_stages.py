"""What an engine tells of its start, and how long each stage takes."""

import logging

import pytest

from engines.nano.utils import stages
from engines.nano.utils.stages import EVERY_S, Stages


@pytest.fixture
def clock(monkeypatch):
    """Seconds, in a list of one."""
    now = [100.0]
    monkeypatch.setattr(stages.time, "perf_counter", lambda: now[0])
    return now


def test_stages_are_told_when_they_begin_and_timed(clock, caplog):
    caplog.set_level(logging.INFO, "engines")
    of = Stages()
    for name, took in (("load weights", 2.5), ("capture graphs", 4.0)):
        with of(name):
            assert caplog.messages[-1] == name
            clock[0] += took
        clock[0] += 1.0  # belongs to no stage
    assert of.seconds == {"load weights": 2.5, "capture graphs": 4.0}


def test_a_stage_that_fails_has_no_time(clock):
    of = Stages()
    with pytest.raises(RuntimeError), of("load weights"):
        raise RuntimeError
    assert of.seconds == {}


def test_progress_is_told_now_and_then(clock, caplog):
    caplog.set_level(logging.INFO, "engines")
    of = Stages()
    with of("compile kernels"):
        for done in range(1, 101):
            clock[0] += EVERY_S / 40
            of.progress(done, 100)
    assert caplog.messages == ["compile kernels", "40 of 100", "80 of 100"]
