"""Does the host's pace follow the host?"""

import time

import pytest

from harness import pace


def least_us():
    """Of several readings: other processes may disturb some of them."""
    return min(pace.host_pace("cpu")["python_us"] for _ in range(5))


def test_a_disturbed_host_is_slower_by_about_what_disturbs_it(monkeypatch):
    calm_us = least_us()
    additions = pace._additions

    def disturbed():
        additions()
        deadline = time.perf_counter() + 2e-3
        while time.perf_counter() < deadline:
            pass

    monkeypatch.setattr(pace, "_additions", disturbed)
    assert least_us() == pytest.approx(calm_us + 2_000, rel=0.3)


def test_one_interruption_does_not_move_it(monkeypatch):
    additions, calls = pace._additions, iter(range(1_000))

    def interrupted():
        additions()
        if next(calls) == 3:
            time.sleep(0.05)

    monkeypatch.setattr(pace, "_additions", interrupted)
    assert pace.host_pace("cpu")["python_us"] < 3_000


def test_slow_places_are_named_by_their_slowest_piece():
    paces = {
        "calm": {"python_us": 50.0, "launch_us": 2.0},
        "a little": {"python_us": 60.0, "launch_us": 2.9},
        "launches": {"python_us": 55.0, "launch_us": 5.0},
        "python": {"python_us": 100.0, "launch_us": 2.0},
    }
    assert pace.slowdowns(paces) == pytest.approx({"launches": 2.5, "python": 2.0})
    assert pace.slowdowns({}) == {}
