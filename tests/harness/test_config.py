"""Composition, and one sentence for whatever is wrong with it."""

from __future__ import annotations

import re

import pytest

from engines.base import InputError
from harness.config import CONF_DIR, GROUPS, ModelConf, WorkloadConf, compose, folder_suffix
from harness.overrides import combinations, near_matches

# hub config.json of each: hidden, layers, heads, kv heads, head_dim, intermediate, vocabulary, positions, theta, tied
PUBLISHED = {
    "qwen3-0.6b": (1024, 28, 16, 8, 128, 3072, 151936, 40960, 1e6, True),
    "qwen3-1.7b": (2048, 28, 16, 8, 128, 6144, 151936, 40960, 1e6, True),
    "qwen3-4b": (2560, 36, 32, 8, 128, 9728, 151936, 40960, 1e6, True),
    "qwen3-8b": (4096, 36, 32, 8, 128, 12288, 151936, 40960, 1e6, False),
    "qwen2.5-1.5b": (1536, 28, 12, 2, 128, 8960, 151936, 131072, 1e6, True),
    "llama-3.2-1b": (2048, 16, 32, 8, 64, 8192, 128256, 131072, 5e5, True),
    "tiny": (96, 3, 6, 2, 32, 256, 260, 1024, 1e6, True),
}


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml"))


def test_defaults_are_the_main_job() -> None:
    config = compose()
    assert (config.engine.name, config.model.name, config.workload.name) == ("fused", "qwen3-0.6b", "latency")
    assert (config.weights, config.dtype, config.device, config.seed, config.verify) == (
        "auto",
        "auto",
        "auto",
        0,
        True,
    )


@pytest.mark.parametrize("group", GROUPS)
def test_every_choice_composes_and_is_named_after_its_file(group: str) -> None:
    for choice in choices(group):
        part = getattr(compose([f"{group}={choice}"]), group)
        if group != "instrument":
            assert part.name == choice


@pytest.mark.parametrize("name", choices("model"))
def test_models_have_their_published_numbers(name: str) -> None:
    m = compose([f"model={name}"]).model
    found = (m.hidden_size, m.num_layers, m.num_heads, m.num_kv_heads, m.head_dim, m.intermediate_size)
    found += (m.vocab_size, m.max_position_embeddings, m.rope_theta, m.tie_word_embeddings)
    assert found == PUBLISHED[name]


def test_throughput_is_nano_vllms_benchmark() -> None:
    workload = compose(["workload=throughput"]).workload
    assert (workload.num_requests, workload.prompt_len, workload.output_len) == (256, [100, 1024], [100, 1024])


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("engine=vlm", "no engine 'vlm'; .*Did you mean vllm"),
        ("model=0.6b", "no model '0.6b'.*qwen3-0.6b"),
        ("workload=latncy", "no workload 'latncy'.*latency"),
        ("instrument=all", "no instrument 'all'; the choices are layers, nvtx, steps"),
        ("sed=1", "no key 'sed'; did you mean seed"),
        ("max_num_seqs=3", "did you mean limits.max_num_seqs"),
        ("+foo=1", "no key 'foo'"),
        ("engine.options.x=1", r"write \+engine.options.x=VALUE"),
        ("foo", "Cannot read the override 'foo'"),
        ("=3", "Cannot read the override '=3'"),
        ("seed=[", "Cannot read the override"),
        ("~engine", "write engine=NAME"),
        ("~seed", "every key is needed"),
        ("engine=[vllm,nano]", "takes one name"),
        ("engine=null", "takes one name"),
        ("engine=vllm,nano", "add -m"),
        ("seed=abc", "'abc' of type 'str' could not be converted to Integer"),
        ("seed=null", "not Optional"),
        ("seed=-1", "seed must be from 0 to 2147483647, not -1"),
        ("verify=perhaps", "could not be converted|not a valid bool"),
        ("dtype=bf16", "dtype must be one of auto, float32, float16, bfloat16, not 'bf16'"),
        ("device=tpu", "device must be one of auto, cuda, cpu"),
        ("weights=", "weights must be"),
        ("limits=3", "LimitsConf"),
        ("limits.max_num_seqs=-3", "limits.max_num_seqs must be at least 1, not -3"),
        ("limits.gpu_memory_utilization=1.5", "at most 1, not 1.5"),
        ("limits.max_model_len=50000", "at most 40960, the most that qwen3-0.6b takes, not 50000"),
        ("workload.decode=[[-1,128]]", r"workload.decode must be pairs .*, not \[-1, 128\]"),
        ("workload.prefill=[[1,2,3]]", "workload.prefill must be pairs"),
        ("workload.cpu_decode=[[a,b]]", "incompatible with type hint 'int'|could not be converted"),
        ("workload.temperature=-0.1", "temperature must be 0"),
        ("workload.kind=serve", "workload.kind must be one of steps, generate, throughput"),
        ("instrument.precision=0", "instrument.precision must be between 0 and 1"),
        ("instrument.max_iterations=0", "instrument.max_iterations must be at least 1, not 0"),
        ("model.num_kv_heads=5", r"divisor of num_heads \(16\), not 5"),
        ("model.architecture=gpt2", "model.architecture must be one of"),
        ("model.eos_token_id=151936", "in the vocabulary"),
        ("model.rope_scaling={rope_type: yarn}", "do not fit the config"),
        ("engine.target=vllm", "engine.target must be a dotted path"),
        ("hydra.foo=1", "hydra.foo"),
        ("hydra/launcher=slrm", "hydra/launcher/slrm"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(override: str, says: str) -> None:
    with pytest.raises(InputError) as caught:
        combinations([override], multirun=False)
    message = str(caught.value)
    assert re.search(says, message), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("field", "value"), [("rope_type", "yarn"), ("factor", "-3"), ("low_freq_factor", "null"), ("factor", "true")]
)
def test_rope_scaling_is_checked(field: str, value: str) -> None:
    with pytest.raises(InputError, match=f"model.rope_scaling.{field} must be"):
        compose(["model=llama-3.2-1b", f"model.rope_scaling.{field}={value}"])


@pytest.mark.parametrize(
    ("kind", "values", "says"),
    [
        ("steps", {}, "workload.prefill and workload.decode must be filled"),
        ("steps", {"decode": [[1, 1]]}, "workload.cpu_prefill and workload.cpu_decode must be filled"),
        ("throughput", {}, "workload.num_requests must be at least 1"),
        ("throughput", {"num_requests": 1, "cpu_num_requests": 1, "prompt_len": [5, 4]}, "workload.prompt_len"),
        ("throughput", {"num_requests": 1, "cpu_num_requests": 1, "prompt_len": [4, 5]}, "workload.output_len"),
    ],
)
def test_workloads_need_what_their_kind_needs(kind: str, values: dict, says: str) -> None:
    with pytest.raises(InputError, match=says):
        WorkloadConf(name="x", kind=kind, **values)


def test_wrong_type_from_python_is_an_input_error_too() -> None:
    with pytest.raises(InputError, match=r"model\.head_dim must be even, not 31"):
        ModelConf(
            name="odd", architecture="llama", hidden_size=62, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=31,
            intermediate_size=8, vocab_size=8, max_position_embeddings=8, rms_norm_eps=1e-6, rope_theta=1e4,
            tie_word_embeddings=True, eos_token_id=0,
        )  # fmt: skip


def test_sweeps_become_their_product() -> None:
    configs = combinations(["engine=vllm,nano", "seed=range(1,4)", "limits.max_num_seqs=4"], multirun=True)
    assert [(c.engine.name, c.seed, c.limits.max_num_seqs) for c in configs] == [
        (engine, seed, 4) for engine in ("vllm", "nano") for seed in (1, 2, 3)
    ]


def test_every_choice_of_a_sweep_is_checked() -> None:
    with pytest.raises(InputError, match="no engine 'nan'"):
        combinations(["engine=vllm,nan"], multirun=True)
    with pytest.raises(InputError, match="seed must be"):
        combinations(["seed=1,2,-3"], multirun=True)


def test_options_of_an_engine_can_be_added() -> None:
    assert combinations(["+engine.options.backend=torch"], multirun=False)[0].engine.options == {"backend": "torch"}


def test_near_matches_prefer_the_last_part_of_a_key() -> None:
    keys = ["limits.max_num_seqs", "workload.num_requests", "seed"]
    assert near_matches("max_num_seqs", keys)[0] == "limits.max_num_seqs"
    assert near_matches("zzz", keys) == []


def test_folder_suffix_is_short_safe_and_distinct() -> None:
    assert folder_suffix("") == ""
    assert folder_suffix("seed=1,weights=/a b") == "-seed=1,weights=_a_b"
    long = [folder_suffix(f"{'x' * 200}={end}") for end in "ab"]
    assert max(map(len, long)) < 100 and long[0] != long[1]
