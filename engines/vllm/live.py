"""One started vLLM engine: starting it in an arm, what it is, and closing it without leftovers."""

from __future__ import annotations

import gc
import os
import tempfile
import weakref
from typing import Any

import torch

from engines.base import Capacity, EngineConfig, InputError
from engines.vllm import arms, package, processes
from engines.vllm.arms import Arm

OWN_PROCESS = "VLLM_ENABLE_V1_MULTIPROCESSING"
SOCKETS = "VLLM_RPC_BASE_PATH"

CALLED = ("from_engine_args", "add_request", "step", "has_unfinished_requests", "abort_request")
"""What is called on vLLM's engine; looked for before a start, not found missing in the middle of a measurement."""

_in_process: weakref.ref[Live] | None = None
"""The engine that runs in this process: vLLM keeps process groups and the rotary cache in globals."""


class Live:
    """A running engine. `engine` is vLLM's LLMEngine; use it only until `close`."""

    def __init__(self, config: EngineConfig, arm: Arm, worker_cls: str | None = None) -> None:
        """Start it: seconds to a minute. InputError if the arguments or this version do not allow it."""
        global _in_process
        self.arm = arm
        self.engine: Any = None
        self._others = {process.pid for process in processes.children()} if _has_psutil() else set()
        vllm = package.load()
        _check_device(config)
        if _in_process is not None and (other := _in_process()) is not None and other.engine is not None:
            raise InputError("A process holds one vLLM engine at a time: close the other first.")
        for method in CALLED:
            package.reach(vllm.LLMEngine, method)
        arguments = arms.engine_args(config, arm)
        if worker_cls is not None:
            arguments["worker_cls"] = worker_cls
        usage = package.reach(package.module("vllm.usage.usage_lib"), "UsageContext.LLM_CLASS")
        # Its sockets are files that it does not remove.
        self._sockets = tempfile.TemporaryDirectory(prefix="vllm-", ignore_cleanup_errors=True)
        os.environ[SOCKETS] = self._sockets.name
        _use_own_process(arm.own_process)
        try:
            self.engine = vllm.LLMEngine.from_engine_args(vllm.EngineArgs(**arguments), usage_context=usage)
        except (ValueError, TypeError) as error:
            # Its configuration errors are ValueErrors (pydantic's too); nothing was started or it is taken down here.
            reason = _reason(error)
            self.close()
            raise InputError(f"vLLM cannot start so ({arm.name}): {reason}") from None
        except BaseException:
            self.close()
            raise
        if not arm.own_process:
            _in_process = weakref.ref(self)

    @property
    def core(self) -> Any:
        """The engine core; only in process."""
        return package.reach(self.engine, "engine_core.engine_core")

    @property
    def schedules_ahead(self) -> bool:
        """Whether a step is scheduled before the tokens of the one before it are known; only in process."""
        return package.reach(self.core, "batch_queue") is not None

    def settle(self) -> None:
        """Run what was scheduled ahead to its end, so that the work that comes next does not wait for it."""
        if self.arm.own_process or self.engine is None:
            return
        while package.reach(self.core, "batch_queue"):
            package.reach(self.engine, "engine_core.get_output")()

    @property
    def runner(self) -> Any:
        """The model runner; only in process."""
        return package.reach(self.engine, "model_executor.driver_worker.model_runner")

    def capacity(self, config: EngineConfig) -> Capacity:
        """What it can hold; a block of the cache is vLLM's null block."""
        cache = package.reach(self.engine, "vllm_config.cache_config")
        blocks, block_size = package.reach(cache, "num_gpu_blocks"), package.reach(cache, "block_size")
        return Capacity(
            max_model_len=int(package.reach(self.engine, "model_config.max_model_len")),
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            kv_cache_tokens=(int(blocks) - 1) * int(block_size),
        )

    def notes(self) -> dict[str, Any]:
        """What a reader of the results must know of this arm, JSON-ready."""
        config = package.reach(self.engine, "vllm_config")
        compilation = package.reach(config, "compilation_config")
        found: dict[str, Any] = {
            "compilation_mode": _name(package.reach(compilation, "mode")),
            "cudagraph_mode": _name(package.reach(compilation, "cudagraph_mode")),
            "cudagraph_capture_sizes": list(package.reach(compilation, "cudagraph_capture_sizes") or []),
            "async_scheduling": bool(package.reach(config, "scheduler_config.async_scheduling")),
            "chunked_prefill": bool(package.reach(config, "scheduler_config.enable_chunked_prefill")),
            "prefix_caching": bool(package.reach(config, "cache_config.enable_prefix_caching")),
            "cache_block_tokens": int(package.reach(config, "cache_config.block_size")),
            "own_process": self.arm.own_process,
        }
        if not self.arm.own_process:
            runner = self.runner
            layers = package.reach(package.reach(runner, "get_model")(), "model.layers")
            attention = package.reach(layers[0], "self_attn.attn")
            found["attention_backend"] = package.reach(attention, "attn_backend").get_name()
            flash = getattr(getattr(attention, "impl", None), "vllm_flash_attn_version", None)
            if flash is not None:
                found["flash_attention_version"] = int(flash)
            found["model_runner"] = "v2" if ".gpu.model_runner" in _base_modules(runner) else "v1"
        return found

    def close(self) -> None:
        """Give memory and processes back. Safe to call twice, and after a start that failed half way."""
        engine, self.engine = self.engine, None
        started = [p for p in processes.children() if p.pid not in self._others] if _has_psutil() else []
        if engine is not None:
            _drop_graphs(engine, self.arm)
            client = getattr(engine, "engine_core", None)
            if client is not None:
                client.shutdown(timeout=processes.GRACE_S)  # its own default kills a slow child, whose memory leaks
            engine.model_executor = None
            del engine, client
        if started:
            processes.end(started)
        if not self.arm.own_process:
            # 0.20's in-process client leaves the process groups and the frozen heap to its process's end.
            package.reach(package.module("vllm.distributed"), "cleanup_dist_env_and_memory")()
        os.environ[OWN_PROCESS] = "0"
        os.environ.pop(SOCKETS, None)
        self._sockets.cleanup()
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def _drop_graphs(engine: Any, arm: Arm) -> None:
    """Let go of captured graphs and of compile hooks, which otherwise keep the weights of a closed engine (0.20)."""
    if arm.own_process:
        return
    worker = getattr(getattr(engine, "model_executor", None), "driver_worker", None)
    runner: Any = getattr(worker, "model_runner", None)
    wrapper: Any = getattr(package.module("vllm.compilation.cuda_graph"), "CUDAGraphWrapper", None)
    if hasattr(wrapper, "clear_all_graphs"):
        wrapper.clear_all_graphs()
    if getattr(runner, "model", None) is None:
        return
    owners = {id(module) for module in runner.get_model().modules()}
    hooks = getattr(package.module("torch._dynamo.convert_frame"), "_bytecode_hooks", {})
    for key, function in list(hooks.items()):
        if id(getattr(function, "__self__", None)) in owners:
            del hooks[key]


def _use_own_process(own: bool) -> None:
    # vLLM reads the variable once and keeps the answer, so a second start in this process must clear it.
    os.environ[OWN_PROCESS] = "1" if own else "0"
    package.reach(package.module("vllm.envs"), "disable_envs_cache")()


def _check_device(config: EngineConfig) -> None:
    platform = package.reach(package.module("vllm.platforms"), "current_platform.device_type")
    if platform != config.device:
        raise InputError(
            f"device={config.device} was asked, but the installed vllm is for {platform or 'no device it can see'}."
        )


def _base_modules(runner: Any) -> str:
    return " ".join(cls.__module__ for cls in type(runner).__mro__)


def _name(value: Any) -> str:
    return str(getattr(value, "name", value))


def _reason(error: Exception) -> str:
    # pydantic puts a headline first, and the sentence that matters on the third line.
    errors = getattr(error, "errors", None)
    if callable(errors):
        return "; ".join(str(item.get("msg", "")) for item in errors()) or package.first_line(error)
    return package.first_line(error)


def _has_psutil() -> bool:
    import importlib.util

    return importlib.util.find_spec("psutil") is not None
