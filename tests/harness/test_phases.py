"""Host phases, on a clock of our own."""

from __future__ import annotations

from harness.instruments.phases import PhaseTimer


class Clock:
    now_ns = 0

    def __call__(self) -> int:
        return self.now_ns

    def spend_us(self, us: int) -> None:
        self.now_ns += us * 1000


class Toy:
    """schedule 5 us; launch 7 us around an inner prepare of 11 us; 13 us of waiting that no method covers."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def schedule(self) -> str:
        self.clock.spend_us(5)
        return "scheduled"

    def prepare(self) -> None:
        self.clock.spend_us(11)

    def launch(self, *, twice: bool) -> None:
        self.clock.spend_us(3)
        for _ in range(1 + twice):
            self.prepare()
        self.clock.spend_us(4)

    def step(self) -> None:
        assert self.schedule() == "scheduled"
        self.launch(twice=True)
        self.clock.spend_us(13)


def _phases(toy: Toy) -> dict:
    return {"schedule": [(toy, "schedule")], "prepare": [(toy, "prepare")], "launch": [(toy, "launch")]}


def test_every_microsecond_is_in_one_phase() -> None:
    clock = Clock()
    toy = Toy(clock)
    timer = PhaseTimer(_phases(toy), clock)
    with timer.attached():
        for _ in range(2):
            timer.start_step("", "decode", 1, 1)
            toy.step()
            trace = timer.finish_step()
            assert trace.phases_us == {"schedule": 5.0, "prepare": 22.0, "launch": 7.0, "rest": 13.0}


def test_the_methods_come_back() -> None:
    clock = Clock()
    toy = Toy(clock)
    toy.prepare = own = lambda: clock.spend_us(1)  # an attribute of the object's own, as taps put them on
    with PhaseTimer(_phases(toy), clock).attached():
        assert "schedule" in vars(toy)
    assert vars(toy) == {"clock": clock, "prepare": own}


def test_a_method_that_raises_leaves_the_next_step_whole() -> None:
    clock = Clock()
    toy = Toy(clock)
    timer = PhaseTimer(_phases(toy), clock)

    def broken() -> None:
        clock.spend_us(2)
        raise RuntimeError

    toy.prepare = broken
    with timer.attached():
        timer.start_step("", "decode", 1, 1)
        try:
            toy.step()
        except RuntimeError:
            toy.__dict__["prepare"] = Toy.prepare.__get__(toy)
        timer.start_step("", "decode", 1, 1)
        toy.step()
        trace = timer.finish_step()
    assert trace.phases_us == {"schedule": 5.0, "prepare": 0.0, "launch": 29.0, "rest": 13.0}
