"""What an engine holds of a GPU is what `gpu_memory_utilization` gives it, alone and beside another engine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
UTILIZATION = 0.3
PRECISION = 0.02
"""Of the GPU's total."""
LENGTH, ROWS, TOKENS = 2048, 256, 16384

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=32768, hidden_size=512, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
        head_dim=128, intermediate_size=1536, max_position_embeddings=LENGTH, tie_word_embeddings=True,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("checkpoint")
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


class Served:
    """An engine in a process of its own, and what it holds as seen from here."""

    def __init__(self, process: subprocess.Popen, free_before: int) -> None:
        self.process, self.free_before = process, free_before
        self.cache_tokens = self.ask("started")
        self.mode = self.ask("mode")

    def ask(self, key: str):
        """The next line that the process says, which must be about `key`."""
        line = self.process.stdout.readline()
        assert line, f"the engine's process ended with {self.process.wait()}"
        said = json.loads(line)
        assert list(said) == [key]
        return said[key]

    def tell(self, what: str) -> None:
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()

    def run_largest_steps(self) -> None:
        self.tell("largest")
        assert self.ask("largest") == [TOKENS, ROWS]

    def held(self) -> int:
        """Bytes, by the driver's own account, or else by what is free now and was before (when nothing else moved)."""
        return by_nvml(self.process.pid) or self.free_before - torch.cuda.mem_get_info()[0]


def by_nvml(pid: int) -> int | None:
    import pynvml as nvml

    try:
        nvml.nvmlInit()
        gpu = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties().uuid}")
        return {p.pid: p.usedGpuMemory for p in nvml.nvmlDeviceGetComputeRunningProcesses(gpu)}.get(pid)
    except nvml.NVMLError:
        return None


@contextmanager
def serve(checkpoint: Path) -> Iterator[Served]:
    torch.zeros(1, device="cuda")  # this process's own context is there before anything is counted
    free = torch.cuda.mem_get_info()[0]
    command = [sys.executable, "-m", "tests.gpu.test_memory", str(checkpoint)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            yield Served(process, free)
        finally:
            process.kill()


def assert_as_asked(engine: Served) -> None:
    total = torch.cuda.mem_get_info()[1]
    share = engine.held() / total
    assert abs(share - UTILIZATION) < PRECISION, f"{share:.4f} of {total / 2**30:.1f} GiB"


def test_utilization_is_honoured(checkpoint):
    with serve(checkpoint) as engine:
        assert engine.mode == "graph"
        engine.run_largest_steps()
        assert_as_asked(engine)


def test_two_engines_share_a_gpu(checkpoint):
    """The second starts while the first serves; each stays within its own share."""
    with serve(checkpoint) as first:
        first.run_largest_steps()
        first.tell("serve")  # until told otherwise
        assert first.ask("serving")
        with serve(checkpoint) as second:
            second.run_largest_steps()
            assert_as_asked(second)
            first.tell("stop")
            assert first.ask("steps") > 0
            first.run_largest_steps()
            # Counted together: by what is free, neither can be seen alone any more.
            total = torch.cuda.mem_get_info()[1]
            both = (first.free_before - torch.cuda.mem_get_info()[0]) / total
            assert abs(both - 2 * UTILIZATION) < 2 * PRECISION
            assert abs(first.cache_tokens - second.cache_tokens) < 0.1 * first.cache_tokens


def main(checkpoint: str) -> None:
    """The engine's process: says one JSON object a line, does what it is told on stdin."""
    from threading import Event, Thread

    from engines.base import EngineConfig, Request, SamplingParams
    from engines.nano import LLM

    def say(key: str, value: object) -> None:
        print(json.dumps({key: value}), flush=True)

    def run(length: int, count: int, sampling: SamplingParams) -> int:
        """The most new tokens of a step."""
        for index in range(count):
            engine.add(Request(f"{index}", tuple((index * 31 + i) % 30000 for i in range(length)), sampling))
        most = 0
        while engine.has_unfinished():
            engine.advance()
            step = engine.last_step()
            if step.kind == "decode" or sampling.max_tokens == 1:
                most = max(most, step.new_tokens)
        return most

    engine = LLM(
        EngineConfig(
            Path(checkpoint), max_model_len=LENGTH, max_num_seqs=ROWS, max_num_batched_tokens=TOKENS,
            gpu_memory_utilization=UTILIZATION,
        )
    )  # fmt: skip
    say("started", engine.capacity.kv_cache_tokens)
    say("mode", engine.mode)
    picky = SamplingParams(top_k=50, top_p=0.9, max_tokens=4, ignore_eos=True)
    stop, serving = Event(), None
    steps = 0

    def keep_serving() -> None:
        nonlocal steps
        while not stop.is_set():
            run(64, ROWS, picky)
            steps += 1

    for line in sys.stdin:
        if line == "largest\n":
            # A prompt as long as the model takes leaves room for its one token: the step is one token a prompt short.
            prompts = TOKENS // LENGTH
            prefill = run(LENGTH - 1, prompts, SamplingParams(max_tokens=1)) + prompts
            say("largest", [prefill, run(64, ROWS, picky)])
        elif line == "serve\n":
            serving = Thread(target=keep_serving)
            serving.start()
            say("serving", True)
        else:
            stop.set()
            serving.join()
            say("steps", steps)


if __name__ == "__main__":
    main(sys.argv[1])
