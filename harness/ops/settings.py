"""What is studied: the command line's settings, and the op's variants from `conf/op`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar, cast

import torch
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from engines.base import InputError
from harness.config import CONF_DIR, DEVICES, DTYPES, ModelConf
from harness.overrides import combinations, near_matches

ALL_MODELS = "all"
T = TypeVar("T")


@dataclass
class VariantConf:
    """One way to do the op; names are dotted paths.

    Unfused: `norm` is the class of a norm module, cuBLAS does the product. Of gate and up, `silu_mul` is the class of
    a module that takes both in one tensor, `swiglu` a function of both apart, each with a product of its own; neither:
    plain PyTorch. `compile`: all of it under torch.compile.

    Fused: `linear` and `gated` are names in the op's `fusions`, called with `options`.

    It is measured up to `max_rows`, where `needs` (a function of the device) says yes and `package` is installed.
    """

    norm: str = ""
    silu_mul: str = ""
    swiglu: str = ""
    compile: bool = False
    linear: str = ""
    gated: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    max_rows: int | None = None
    needs: str = ""
    package: str = ""

    def __post_init__(self) -> None:
        if bool(self.norm) == bool(self.linear and self.gated):
            raise InputError("A variant needs either a norm, or both linear and gated.")

    @property
    def fused(self) -> bool:
        return bool(self.linear)


@dataclass
class OpConf:
    """A file of `conf/op`. Ratios refer to `baseline`, one of the variants."""

    name: str = MISSING
    rows: list[int] = MISSING
    cpu_rows: list[int] = MISSING
    fusions: str = MISSING
    baseline: str = MISSING
    variants: dict[str, VariantConf] = MISSING


@dataclass
class Settings:
    """The command line. Empty lists stand for all that the op's file names."""

    op: str = "rms_norm_linear"
    model: str = "qwen3-0.6b"
    rows: list[int] = field(default_factory=list)
    variants: list[str] = field(default_factory=list)
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0
    precision: float = 0.01
    min_iterations: int = 20
    max_iterations: int = 200
    max_seconds_per_shape: float = 2.0
    results: str = "results"
    into: str = ""

    def __post_init__(self) -> None:
        for name, choices in (("dtype", DTYPES), ("device", DEVICES)):
            if getattr(self, name) not in choices:
                raise InputError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}.")
        if any(rows < 1 for rows in self.rows):
            raise InputError("rows must be at least 1.")
        if not 0 < self.precision < 1 or not 1 <= self.min_iterations <= self.max_iterations:
            raise InputError("precision must lie between 0 and 1, and 1 <= min_iterations <= max_iterations.")
        if self.max_seconds_per_shape <= 0:
            raise InputError("max_seconds_per_shape must be above 0.")

    @property
    def device_type(self) -> str:
        """cuda or cpu. InputError: a GPU was asked for and there is none."""
        available = torch.cuda.is_available()
        if self.device == "cuda" and not available:
            raise InputError("device=cuda needs a GPU that torch can use; device=auto takes the CPU.")
        return "cuda" if available and self.device != "cpu" else "cpu"

    @property
    def dtype_name(self) -> str:
        """bfloat16 on a GPU and float32 without, unless something else is asked for."""
        return self.dtype if self.dtype != "auto" else "bfloat16" if self.device_type == "cuda" else "float32"


def parse(arguments: Sequence[str]) -> Settings:
    """`key=value` arguments. InputError: an unknown key, or a value that does not fit."""
    if wrong := [a for a in arguments if a.partition("=")[0] not in asdict(Settings())]:
        near = near_matches(wrong[0].partition("=")[0], asdict(Settings()))
        guess = f"; did you mean {' or '.join(near)}?" if near else "."
        raise InputError(f"There is no setting {wrong[0]!r}{guess}")
    return _merged(Settings, OmegaConf.from_dotlist(list(arguments)))


def op_conf(settings: Settings) -> OpConf:
    """The op's file with the variants that are asked for. InputError: there is no such op or variant."""
    known = sorted(path.stem for path in (CONF_DIR / "op").glob("*.yaml"))
    if settings.op not in known:
        raise InputError(f"There is no op {settings.op!r}; known are {', '.join(known)}.")
    conf = _merged(OpConf, OmegaConf.load(CONF_DIR / "op" / f"{settings.op}.yaml"))
    if unknown := [name for name in settings.variants if name not in conf.variants]:
        raise InputError(f"{conf.name} has no variant {unknown[0]!r}; it has {', '.join(conf.variants)}.")
    if settings.variants:
        conf.variants = {name: conf.variants[name] for name in settings.variants}
    return conf


def models(settings: Settings) -> list[ModelConf]:
    """Those of `model`: a name, several with commas between, or all published ones. InputError: an unknown one."""
    if settings.model != ALL_MODELS:
        return [combinations([f"model={name}"], multirun=False)[0].model for name in settings.model.split(",")]
    names = sorted(path.stem for path in (CONF_DIR / "model").glob("*.yaml"))
    found = [combinations([f"model={name}"], multirun=False)[0].model for name in names]
    return [model for model in found if model.hub_id]


def _merged(kind: type[T], values: Any) -> T:
    try:
        return cast(T, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), values)))
    except OmegaConfBaseException as error:
        where = error.full_key or "the settings"
        raise InputError(f"{where}: {str(error.msg or error).splitlines()[0]}.") from error
