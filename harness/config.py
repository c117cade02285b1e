"""What a run is made of: dataclasses that check every value, and how they are composed from `conf/`.

Hydra merges the yaml groups of `conf/` into `Config`, so types and unknown keys are caught at composition; ranges and
names are caught by the dataclasses' `__post_init__`. Both surface as `InputError`, one sentence that names the key.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from engines.base import InputError
from harness.gpus import gpu_count

CONF_DIR = Path(__file__).resolve().parent.parent / "conf"
"""The config groups; a top-level folder both in a checkout and in an installed wheel."""
CONFIG_NAME = "config"
GROUPS = ("engine", "model", "workload", "instrument")

ARCHITECTURES = ("qwen3", "qwen2", "llama")
WORKLOAD_KINDS = ("steps", "generate", "throughput", "serving")
ARRIVALS = ("poisson", "burst", "all", "trace")
LENGTHS = ("uniform", "lognormal")
DTYPES = ("auto", "float32", "float16", "bfloat16")
DEVICES = ("auto", "cuda", "cpu")
LLAMA3_ROPE_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
MAX_FOLDER_SUFFIX = 80
"""Characters of a sweep folder's name that tell its other overrides; longer ones are cut and hashed."""


def _require(ok: bool, key: str, what: str, value: object) -> None:
    if not ok:
        raise InputError(f"{key} must be {what}, not {value!r}.")


def _at_least(minimum: int, prefix: str, node: object, *names: str) -> None:
    for name in names:
        value = getattr(node, name)
        _require(value is None or value >= minimum, f"{prefix}{name}", f"at least {minimum}", value)


def _one_of(choices: Sequence[str], key: str, value: str) -> None:
    _require(value in choices, key, f"one of {', '.join(choices)}", value)


@dataclass
class EngineConf:
    """One engine. `target` is its class, as a dotted path.

    `package` is the import that the engine cannot do without ("" for none), `extra` the pip extra that brings it, and
    `cpu_extra` the one for machines without a GPU where that differs. `options` are checked by the engine itself.
    """

    name: str = MISSING
    target: str = MISSING
    package: str = ""
    extra: str = ""
    cpu_extra: str = ""
    contestant: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require(bool(self.name), "engine.name", "a name", self.name)
        dotted = all(part.isidentifier() for part in self.target.split(".")) and "." in self.target
        _require(dotted, "engine.target", "a dotted path to a class", self.target)


@dataclass
class ModelConf:
    """A model's architecture, with the numbers of its published config.json, so that no hub is needed."""

    name: str = MISSING
    hub_id: str = ""
    architecture: str = MISSING
    hidden_size: int = MISSING
    num_layers: int = MISSING
    num_heads: int = MISSING
    num_kv_heads: int = MISSING
    head_dim: int = MISSING
    intermediate_size: int = MISSING
    vocab_size: int = MISSING
    max_position_embeddings: int = MISSING
    rms_norm_eps: float = MISSING
    rope_theta: float = MISSING
    rope_scaling: dict[str, Any] | None = None
    tie_word_embeddings: bool = MISSING
    eos_token_id: int = MISSING

    def __post_init__(self) -> None:
        _require(bool(self.name), "model.name", "a name", self.name)
        _one_of(ARCHITECTURES, "model.architecture", self.architecture)
        _at_least(1, "model.", self, "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
        _at_least(1, "model.", self, "intermediate_size", "vocab_size", "max_position_embeddings")
        divides = self.num_heads % self.num_kv_heads == 0
        _require(divides, "model.num_kv_heads", f"a divisor of num_heads ({self.num_heads})", self.num_kv_heads)
        _require(self.head_dim % 2 == 0, "model.head_dim", "even", self.head_dim)
        _require(self.rms_norm_eps > 0, "model.rms_norm_eps", "above 0", self.rms_norm_eps)
        _require(self.rope_theta > 0, "model.rope_theta", "above 0", self.rope_theta)
        in_vocab = 0 <= self.eos_token_id < self.vocab_size
        _require(in_vocab, "model.eos_token_id", f"in the vocabulary of {self.vocab_size}", self.eos_token_id)
        if self.rope_scaling is not None:
            _check_rope_scaling(self.rope_scaling)


def _check_rope_scaling(scaling: dict[str, Any]) -> None:
    rope_type = scaling.get("rope_type")
    _require(rope_type == "llama3", "model.rope_scaling.rope_type", "llama3 (or rope_scaling null)", rope_type)
    for key in LLAMA3_ROPE_KEYS:
        value = scaling.get(key)
        number = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
        _require(number, f"model.rope_scaling.{key}", "a number above 0", value)


@dataclass
class SloConf:
    """What a served request must keep to count as goodput; None: no bound."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None

    def __post_init__(self) -> None:
        for name in ("ttft_ms", "tpot_ms"):
            bound = getattr(self, name)
            _require(bound is None or bound > 0, f"workload.slo.{name}", "above 0, or null for no bound", bound)


@dataclass
class WorkloadConf:
    """What is run.

    `steps`: single steps over grids; `prefill` holds [sequences, prompt tokens], `decode` [sequences, tokens in the
    cache]; the `cpu_` grids are used without a GPU. `generate`: whole calls over the same grids, where `decode` holds
    [sequences, prompt tokens] and each makes `output_tokens`; with `num_requests`, a throughput workload after them.
    `throughput`: `num_requests` requests (`cpu_num_requests` without a GPU) that all arrive at once, lengths drawn from
    the ranges `prompt_len` and `output_len`, ends included. `serving`: requests that arrive over time, once for each of
    `rates` (`cpu_rates`), with lengths from a distribution over those ranges or from a file `trace`; of a trace as many
    lines as there are requests, 0 for all.
    """

    name: str = MISSING
    kind: str = MISSING
    prefill: list[list[int]] = field(default_factory=list)
    decode: list[list[int]] = field(default_factory=list)
    cpu_prefill: list[list[int]] = field(default_factory=list)
    cpu_decode: list[list[int]] = field(default_factory=list)
    output_tokens: int = 0
    num_requests: int = 0
    cpu_num_requests: int = 0
    prompt_len: list[int] = field(default_factory=list)
    output_len: list[int] = field(default_factory=list)
    arrivals: str = "all"
    rates: list[float] = field(default_factory=list)
    cpu_rates: list[float] = field(default_factory=list)
    burst_size: int = 8
    lengths: str = "uniform"
    trace: str = ""
    slo: SloConf = field(default_factory=SloConf)
    temperature: float = 0.6

    def __post_init__(self) -> None:
        _require(bool(self.name), "workload.name", "a name", self.name)
        _one_of(WORKLOAD_KINDS, "workload.kind", self.kind)
        _require(self.temperature >= 0, "workload.temperature", "0 (greedy) or more", self.temperature)
        for name, second in (("prefill", "tokens"), ("decode", "context")):
            for grid in (name, f"cpu_{name}"):
                for shape in getattr(self, grid):
                    pair = len(shape) == 2 and min(shape) >= 1
                    _require(pair, f"workload.{grid}", f"pairs [batch, {second}] of numbers from 1 on", shape)
        if self.kind == "generate":
            _at_least(2, "workload.", self, "output_tokens")
        if self.kind in ("steps", "generate"):
            for prefix in ("", "cpu_"):
                shapes = getattr(self, f"{prefix}prefill") + getattr(self, f"{prefix}decode")
                names = f"workload.{prefix}prefill and workload.{prefix}decode"
                _require(bool(shapes), names, "filled, at least one of them", [])
        if self.kind == "serving":
            self._check_serving()
        if self.kind == "throughput" or (self.num_requests and not self.trace):
            _at_least(1, "workload.", self, "num_requests", "cpu_num_requests")
            for name in ("prompt_len", "output_len"):
                bounds = getattr(self, name)
                ok = len(bounds) == 2 and 1 <= bounds[0] <= bounds[1]
                _require(ok, f"workload.{name}", "a range [low, high] with 1 <= low <= high", bounds)

    def _check_serving(self) -> None:
        _one_of(ARRIVALS, "workload.arrivals", self.arrivals)
        _one_of(LENGTHS, "workload.lengths", self.lengths)
        _at_least(1, "workload.", self, "burst_size")
        _at_least(0 if self.trace else 1, "workload.", self, "num_requests", "cpu_num_requests")
        for name in () if self.arrivals == "all" else ("rates", "cpu_rates"):
            rates = getattr(self, name)
            _require(bool(rates) and min(rates) > 0, f"workload.{name}", "a list of requests per second above 0", rates)
        _require(bool(self.trace) or self.arrivals != "trace", "workload.trace", "a file, for arrivals=trace", "")


@dataclass
class InstrumentConf:
    """How it is measured: `nvtx` ranges; a pass that times the phases of the `host`; on a GPU one that records the
    `kernels` of steps as they are timed; one that takes their `energy`, with two loops of `energy_seconds` a shape; an
    `eager` pass with ops; a `graph` pass with layers inside CUDA graphs.

    The timed pass of a shape ends once its median is known to `precision` (relative), within the bounds on iterations
    and seconds (of two that cross, `max_iterations` counts); instrumented passes take `traced_iterations` steps.
    """

    nvtx: bool = True
    host: bool = True
    kernels: bool = True
    energy: bool = False
    eager: bool = True
    graph: bool = True
    precision: float = 0.01
    min_iterations: int = 30
    max_iterations: int = 500
    max_seconds_per_shape: float = 5.0
    traced_iterations: int = 10
    energy_seconds: float = 3.0

    def __post_init__(self) -> None:
        _require(0 < self.precision < 1, "instrument.precision", "between 0 and 1", self.precision)
        _at_least(1, "instrument.", self, "min_iterations", "max_iterations", "traced_iterations")
        for name in ("max_seconds_per_shape", "energy_seconds"):
            seconds = getattr(self, name)
            _require(seconds > 0, f"instrument.{name}", "above 0", seconds)


@dataclass
class LimitsConf:
    """What an engine may take. None means: what the workload needs (`kv_cache_tokens`: what fits free memory)."""

    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int = 16384
    gpu_memory_utilization: float = 0.9
    kv_cache_tokens: int | None = None

    def __post_init__(self) -> None:
        _at_least(2, "limits.", self, "max_model_len")
        _at_least(1, "limits.", self, "max_num_seqs", "max_num_batched_tokens", "kv_cache_tokens")
        share = self.gpu_memory_utilization
        _require(0 < share <= 1, "limits.gpu_memory_utilization", "above 0 and at most 1", share)


@dataclass
class Config:
    """A whole run. `dtype` auto is bfloat16 on a GPU and float32 without; `weights` is auto, random or a folder."""

    engine: EngineConf = MISSING
    model: ModelConf = MISSING
    workload: WorkloadConf = MISSING
    instrument: InstrumentConf = field(default_factory=InstrumentConf)
    limits: LimitsConf = field(default_factory=LimitsConf)
    weights: str = "auto"
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0
    verify: bool = True
    results: str = "results"

    def __post_init__(self) -> None:
        _require(bool(self.weights), "weights", "auto, random or a folder", self.weights)
        _require(bool(self.results), "results", "a folder", self.results)
        _one_of(DTYPES, "dtype", self.dtype)
        _one_of(DEVICES, "device", self.device)
        _require(0 <= self.seed < 2**31, "seed", "from 0 to 2147483647", self.seed)
        length, limit = self.limits.max_model_len, self.model.max_position_embeddings
        fits = length is None or length <= limit
        _require(fits, "limits.max_model_len", f"at most {limit}, the most that {self.model.name} takes", length)


def folder_suffix(overrides: str) -> str:
    """The end of a sweep folder's name that tells its remaining overrides apart; "" for none."""
    if not overrides:
        return ""
    plain = re.sub(r"[^\w.=,+-]", "_", overrides)
    if len(plain) > MAX_FOLDER_SUFFIX:
        plain = f"{plain[:MAX_FOLDER_SUFFIX]}-{hashlib.sha256(overrides.encode()).hexdigest()[:8]}"
    return f"-{plain}"


def register() -> None:
    """Make the schema and the resolvers of `conf/` known to Hydra. Safe to call twice."""
    ConfigStore.instance().store(name="base_config", node=Config)
    OmegaConf.register_new_resolver("folder_suffix", folder_suffix, replace=True)
    OmegaConf.register_new_resolver("gpu_count", gpu_count, replace=True)
    # Our launchers have the names of the plugins' own, so that nobody starts one without its GPU rule by mistake.
    warnings.filterwarnings("ignore", message=r"\s*'hydra/launcher/\w+' is validated against ConfigStore schema")


def to_config(node: DictConfig) -> Config:
    """`node` as checked dataclasses; InputError for what is missing or out of range."""
    try:
        return cast(Config, OmegaConf.to_object(node))
    except OmegaConfBaseException as error:
        raise InputError(f"{error.full_key or 'the config'}: {str(error.msg or error).splitlines()[0]}.") from error


def compose_node(overrides: Sequence[str], with_hydra: bool = False, config_dir: Path | None = None) -> DictConfig:
    """The composed config as Hydra makes it; Hydra's own exceptions for what it does not take."""
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(config_dir or CONF_DIR), version_base="1.3", job_name="harness"):
        return hydra_compose(CONFIG_NAME, overrides=list(overrides), return_hydra_config=with_hydra)


def compose(overrides: Sequence[str] = ()) -> Config:
    """The config that `python -m harness OVERRIDES` runs, as checked dataclasses."""
    return to_config(compose_node(overrides))


register()
