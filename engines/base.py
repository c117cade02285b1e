"""The protocol that every engine speaks, and the vocabulary in which engines name their work.

An engine never imports the harness. What it must tell the outside (this is layer 7's attention) it says through a
`Probe`, which the harness implements and `hook` puts on the engine's modules. With no probe there are no hooks, so the
cost is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor, nn

StepKind = Literal["prefill", "decode", "mixed"]
TraceMode = Literal["eager", "graph"]

BLOCKS = ("embed", "attention", "mlp", "head", "sample", "step")
"""`step` is the GPU's work around the model: its inputs brought and computed, its tokens copied to the host."""
OPS = (
    "embed", "input_norm", "qkv_proj", "qk_norm", "rope", "kv_write", "attention", "o_proj", "post_norm",
    "gate_up_proj", "silu_mul", "down_proj", "final_norm", "lm_head", "sample", "prepare", "read_back",
)  # fmt: skip
HOST_PHASES = ("schedule", "prepare", "launch", "sample", "finish")
"""What the host does in a step, in this order: choose sequences, make the model's inputs, launch its kernels, launch
sampling, take the tokens in."""
HostPhases = Mapping[str, Sequence[tuple[Any, str]]]
"""Phase to the methods, as (object, name), in which it happens."""
WHOLE_LAYER = "layer"
"""`block` and `op` of an interval that spans a whole decoder layer."""
NO_LAYER = -1
"""`layer_index` of what lies outside the decoder layers: embedding, final norm, head, sampling."""
HOTTEST = 1e30
"""Highest temperature: any that is used draws evenly, and logits of -inf over an infinite one are not a number."""


class InputError(ValueError):
    """Something the user asked for cannot be done; the message is one sentence that says what and why."""


class TraceUnsupported(RuntimeError):
    """The engine cannot be traced in the asked mode on this machine; the message says why."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens of one request are drawn, with the names that vLLM and nano-vLLM use.

    `temperature` 0 is greedy. `top_k` 0 (or -1, as in vLLM) and `top_p` 1.0 keep the whole distribution.
    """

    temperature: float = 1.0
    max_tokens: int = 64
    ignore_eos: bool = False
    top_k: int = 0
    top_p: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= HOTTEST:  # nor not a number
            raise InputError(f"temperature must be from 0 (greedy) to {HOTTEST:g}, not {self.temperature}.")
        if self.max_tokens < 1:
            raise InputError(f"max_tokens must be at least 1, not {self.max_tokens}.")
        if self.top_k < -1:
            raise InputError(f"top_k must be -1, 0 (all tokens) or more, not {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be in (0, 1], not {self.top_p}.")
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What an engine is started with. `options` are the engine's own, checked by the engine.

    `kv_cache_tokens` fixes the cache's size in tokens; None sizes it from the memory that is really free, within
    `gpu_memory_utilization` of the GPU's total (on CPU: just what max_num_seqs × max_model_len needs, at most 4 GiB).
    """

    checkpoint: Path
    dtype: str = "bfloat16"  # float32, float16 or bfloat16
    device: str = "cuda"  # cuda or cpu
    max_model_len: int = 4096
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 16384
    gpu_memory_utilization: float = 0.9
    kv_cache_tokens: int | None = None
    prefix_caching: bool = False
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt as token ids, and how its continuation is drawn."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams


class Scheduled(NamedTuple):
    """One sequence's share of a step: `new_tokens` computed on top of `context_len` tokens already in the cache.

    A named tuple, not a dataclass: engines make one per sequence inside timed steps, and it is three times as cheap.
    """

    request_id: str
    new_tokens: int
    context_len: int


@dataclass(frozen=True, slots=True)
class Step:
    """What one scheduler step was and what it produced. `tokens` holds (request_id, token_id) as its rows do."""

    kind: StepKind
    scheduled: tuple[Scheduled, ...]
    tokens: tuple[tuple[str, int], ...] = ()
    finished: tuple[str, ...] = ()

    @property
    def batch_size(self) -> int:
        return len(self.scheduled)

    @property
    def new_tokens(self) -> int:
        return sum(s.new_tokens for s in self.scheduled)

    @property
    def context_len(self) -> int:
        """Mean tokens already in the cache per sequence, rounded down."""
        return sum(s.context_len for s in self.scheduled) // max(1, len(self.scheduled))


def step_kind(scheduled: Iterable[Scheduled], computes_prompt: Callable[[str], bool]) -> StepKind:
    """`prefill` if every sequence computes prompt tokens, `decode` if none does, else `mixed`."""
    flags = {computes_prompt(s.request_id) for s in scheduled}
    return "mixed" if len(flags) == 2 else "prefill" if True in flags else "decode"


@dataclass(frozen=True, slots=True)
class RequestResult:
    """A finished request. Times are `time.perf_counter()` seconds; `token_times_s` has one entry per output token.

    `arrival_s` is when the request was due, also where the engine came to it later: waiting counts.
    """

    request_id: str
    prompt_tokens: int
    token_ids: tuple[int, ...]
    arrival_s: float
    token_times_s: tuple[float, ...]
    finish_reason: str  # "length", "stop" or "abort"


@dataclass(frozen=True, slots=True)
class Scored:
    """Greedy continuation of one prompt: tokens [n] and the logits [n, vocab] (float32, on CPU) each came from."""

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logits: Tensor


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a started engine can hold."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_cache_tokens: int


@dataclass(frozen=True, slots=True)
class Site:
    """A place in the model whose time is wanted: (layer_index, block, op) in the shared vocabulary.

    `op` joins with "+" where one kernel does several. A whole decoder layer has block and op `layer`.
    """

    layer_index: int
    block: str
    op: str

    def __post_init__(self) -> None:
        if (self.block, self.op) == (WHOLE_LAYER, WHOLE_LAYER):
            return
        unknown = [op for op in self.op.split("+") if op not in OPS]
        if self.block not in BLOCKS or unknown:
            raise ValueError(f"not in the layer vocabulary: block {self.block!r}, op {self.op!r}")


@runtime_checkable
class Probe(Protocol):
    """Told when a site starts and ends. Calls nest (a layer's ops lie inside the layer)."""

    def wants(self, site: Site) -> bool:
        """Whether this probe wants calls for `site`; asked once, when hooks are put on."""
        ...

    def begin(self, site: Site, rows: int) -> None:
        """`site` starts, for `rows` tokens (the padded batch in a graph)."""
        ...

    def end(self, site: Site) -> None: ...


def hook(modules: Iterable[tuple[Site, nn.Module]], probe: Probe) -> Callable[[], None]:
    """Put `probe` on `modules` through forward hooks; returns the function that takes it off again.

    Hooks fire when the module is *called*: in eager execution at each step, in a CUDA graph only while it is captured.
    """
    wanted = [(site, module) for site, module in modules if probe.wants(site)]  # all asked before the first hook is on
    handles = []
    for site, module in wanted:

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], site: Site = site) -> None:
            tensors = [a for a in (*args, *kwargs.values()) if hasattr(a, "shape") and a.dim() > 0]
            probe.begin(site, tensors[0].shape[0] if tensors else 0)

        def after(_module: nn.Module, _args: Any, _kwargs: Any, _output: Any, site: Site = site) -> None:
            probe.end(site)

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after, with_kwargs=True))

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return remove


@runtime_checkable
class Engine(Protocol):
    """What the harness needs of an engine. Constructed with one `EngineConfig`; what is told meanwhile to the logger
    `engines`, or one below it, is shown.

    `arm` names the variant that runs (an engine may have several: vLLM's `inproc`, `default`, ...); `notes` holds what
    a reader of the results must know (attention backend, graph buckets, fallbacks with their reasons, seconds of each
    stage of the start), JSON-ready.
    """

    name: str
    arm: str
    mode: Literal["eager", "graph", "compiled"]
    """How decode steps run now: kernels launched one by one, replayed from a graph, or compiled (with or without)."""
    launches_ahead: bool
    """Whether a step may be launched before the one before it was read. It runs then before it is called for."""
    capacity: Capacity
    notes: dict[str, Any]

    @classmethod
    def check_options(cls, options: Mapping[str, Any]) -> None:
        """InputError: an option that this engine does not have, or a value that it does not take on any machine.

        Starts nothing, so that a mistake is told before anything else is started.
        """
        ...

    def add(self, request: Request) -> object:
        """Queue a request; InputError if it can never run (longer than the model or the cache takes)."""
        ...

    def advance(self) -> None:
        """Run one scheduler step to its end: the tokens are on the host when this returns.

        This is what is timed. Nothing that only an observer needs belongs in here: see `last_step`.
        """
        ...

    def last_step(self) -> Step:
        """What the step that ran last was; call it before the next one."""
        ...

    def has_unfinished(self) -> bool: ...

    def abort(self, request_ids: Iterable[str]) -> None:
        """Drop requests, queued or running, and free their cache."""
        ...

    def serve(
        self,
        requests: Iterable[Request],
        on_finish: Callable[[RequestResult], None] | None = None,
        arrivals_s: Sequence[float] | None = None,
    ) -> list[RequestResult]:
        """Run all requests at the engine's full speed; results in the order of `requests`.

        `arrivals_s` says for each how many seconds after this call it arrives (None: all now). The engine must not
        know of a request before that; see `engines.arrivals.Arrivals`. InputError: times that cannot be.
        """
        ...

    def score(self, requests: Iterable[Request]) -> list[Scored]:
        """Continue prompts greedily through the normal path (graphs included), keeping each token's logits."""
        ...

    def host_phases(self) -> HostPhases:
        """The methods that a step calls on the host, as it runs now; empty where they cannot be told."""
        ...

    def attach(self, probe: Probe, mode: TraceMode) -> None:
        """Put `probe` on and run steps in `mode` until `detach`; TraceUnsupported says why not.

        `eager`: no graphs, every op calls the probe at each step. `graph`: decode graphs are captured anew with the
        probe's hooks on, which then see capture only (record external events there).
        """
        ...

    def detach(self) -> None: ...

    def close(self) -> None:
        """Give all memory and processes back. Safe to call twice."""
        ...
