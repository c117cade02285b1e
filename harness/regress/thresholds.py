"""What counts as a change, and how sure one must be of it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields

from engines.base import InputError


@dataclass(frozen=True)
class Thresholds:
    """All shares are of the time (for rates: of its inverse). InputError: a value that no threshold can have.

    `launch_noise` is a guess, on the safe side, at the standard deviation of an engine's median from one launch to the
    next. With few launches it is the least that is assumed, so a run that was steady by itself is not believed more
    than two launches can be. Where both sides have `min_launches`, their own launches correct it downwards: the guess
    then counts like `guess_weight` launches more, so it loses weight as launches come, and never all of it.
    """

    min_effect: float = 0.02
    """A change below this is none, however sure."""
    same_within: float = 0.03
    """SAME needs the whole interval within this of no change."""
    confidence: float = 0.95
    """Of the intervals shown, and of SAME."""
    false_discovery: float = 0.01
    """Most of what is called FASTER or SLOWER that may be neither, on average (Benjamini and Hochberg)."""
    launch_noise: float = 0.01
    guess_weight: float = 4.0
    """Degrees of freedom that `launch_noise` counts for beside those of the launches themselves."""
    min_launches: int = 3
    """From so many launches on, a side's own launches say how much launches differ."""
    min_samples: int = 5
    """Fewest samples in a launch, on a side with fewer launches than that."""
    max_unsure: float = 0.25
    """Largest share of UNSURE rows that still lets a build pass."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("min_launches", "min_samples"):
                low, high, said = 2.0, math.inf, "2 or more"
            elif field.name in ("confidence", "false_discovery"):
                low, high, said = math.ulp(0), 1 - math.ulp(0.5), "between 0 and 1"
            elif field.name == "min_effect":
                low, high, said = math.ulp(0), math.inf, "above 0"
            elif field.name == "max_unsure":
                low, high, said = 0.0, 1.0, "from 0 to 1"
            else:
                low, high, said = 0.0, math.inf, "0 or more"
            if not (low <= value <= high and math.isfinite(value)):
                raise InputError(f"{field.name} must be {said}, not {value}.")

    def record(self) -> dict[str, float]:
        """JSON-ready."""
        return asdict(self)


PRESETS = {
    # For a machine that is known to be quiet, with many launches: half of everything.
    "strict": Thresholds(min_effect=0.01, same_within=0.015, launch_noise=0.005, max_unsure=0.1),
    "default": Thresholds(),
    # For shared machines and runners without a GPU: only what nobody would argue about.
    "lenient": Thresholds(min_effect=0.05, same_within=0.1, false_discovery=0.001, launch_noise=0.02, max_unsure=0.5),
}
