"""Where weights come from, and that random checkpoints are real ones."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from engines.base import InputError
from harness import checkpoints, weights
from harness.config import ModelConf, compose

LLAMA3 = compose(["model=llama-3.2-1b"]).model.rope_scaling
VARIANTS = {
    "qwen3": {"tie_word_embeddings": False},
    "qwen2": {"hidden_size": 192},  # qwen2 has no head_dim of its own: 6 heads of 32
    "llama": {"rope_theta": 5e5, "rope_scaling": LLAMA3, "max_position_embeddings": 131072},
}


def tiny(architecture: str = "qwen3", **changes: object) -> ModelConf:
    return replace(compose(["model=tiny"]).model, architecture=architecture, **changes)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, and caches of the test's own. The hub's client reads its settings when it is imported."""
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.parametrize("architecture", VARIANTS)
def test_transformers_loads_a_random_checkpoint(architecture: str) -> None:
    model = tiny(architecture, **VARIANTS[architecture])
    found = weights.resolve(model, "random", seed=3)
    loaded, info = AutoModelForCausalLM.from_pretrained(found.path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.architectures == [type(loaded).__name__]
    assert loaded.dtype == torch.bfloat16
    attention = loaded.model.layers[0].self_attn
    assert attention.q_proj.weight.shape == (192, model.hidden_size)
    assert (attention.q_proj.bias is not None) == (architecture == "qwen2")
    stored = dict(checkpoints.tensor_shapes(model))
    assert {name: tuple(p.shape) for name, p in loaded.named_parameters()} == stored
    logits = loaded(torch.tensor([[1, 2, 3]])).logits
    assert logits.isfinite().all() and logits.std() > 0


@pytest.mark.parametrize("architecture", VARIANTS)
def test_config_json_keeps_every_number(architecture: str) -> None:
    model = tiny(architecture, **VARIANTS[architecture])
    config = AutoConfig.from_pretrained(weights.resolve(model, "random").path)
    rope = config.rope_parameters
    assert rope["rope_theta"] == model.rope_theta
    if model.rope_scaling:
        assert {key: rope[key] for key in model.rope_scaling} == model.rope_scaling
    else:
        assert rope["rope_type"] == "default"
    assert (config.num_hidden_layers, config.num_key_value_heads) == (model.num_layers, model.num_kv_heads)
    assert (config.vocab_size, config.rms_norm_eps) == (model.vocab_size, model.rms_norm_eps)
    assert config.dtype == torch.bfloat16
    assert (config.tie_word_embeddings, config.eos_token_id) == (model.tie_word_embeddings, model.eos_token_id)


def test_values_have_the_stated_distributions() -> None:
    weight = checkpoints.random_tensor("model.layers.0.mlp.up_proj.weight", (400, 400), 0).float()
    assert abs(weight.mean()) < 3e-4 and abs(weight.std() - 0.02) < 2e-4
    for name in (
        "model.norm.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.self_attn.q_norm.weight",
    ):
        norm = checkpoints.random_tensor(name, (100_000,), 0).float()
        assert abs(norm.mean() - 1) < 1e-3 and abs(norm.std() - 0.05) < 1e-3
    bias = checkpoints.random_tensor("model.layers.0.self_attn.q_proj.bias", (10_000,), 0).float()
    assert abs(bias.mean()) < 1e-3 and bias.std() > 0.01


def test_same_seed_same_bytes_and_other_seed_other_values(tmp_path: Path) -> None:
    model = tiny()
    tensors = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        folder = tmp_path / name
        folder.mkdir()
        checkpoints.write_checkpoint(model, seed, folder)
        tensors.append(load_file(folder / "model.safetensors"))
    first, again, other = tensors
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    layers = [first[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(2)]
    assert not torch.equal(*layers)


def test_large_checkpoints_are_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "SHARD_BYTES", 200_000)
    model = tiny()
    whole = {name: checkpoints.random_tensor(name, shape, 0) for name, shape in checkpoints.tensor_shapes(model)}
    found = weights.resolve(model, "random")
    index = json.loads((found.path / weights.INDEX).read_text())
    assert index["metadata"]["total_size"] == checkpoints.checkpoint_bytes(model)
    for file in set(index["weight_map"].values()):
        shard = load_file(found.path / file)
        assert {name for name, where in index["weight_map"].items() if where == file} == set(shard)
        assert all(torch.equal(whole.pop(name), tensor) for name, tensor in shard.items())
    assert not whole
    loaded, info = AutoModelForCausalLM.from_pretrained(found.path, output_loading_info=True)
    assert not info["missing_keys"] and loaded.num_parameters() == checkpoints.checkpoint_bytes(model) // 2


def test_sizes_are_the_published_ones() -> None:
    def parameters(name: str) -> int:
        return checkpoints.checkpoint_bytes(compose([f"model={name}"]).model) // 2

    assert parameters("qwen3-0.6b") == 596_049_920
    assert parameters("qwen3-8b") == 8_190_735_360
    assert parameters("qwen2.5-1.5b") == 1_543_714_304
    assert parameters("llama-3.2-1b") == 1_235_814_400


def test_random_checkpoints_are_cached_by_what_decides_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    path = weights.resolve(model, "random").path
    monkeypatch.setattr(checkpoints, "write_checkpoint", lambda *_: pytest.fail("written twice"))
    assert weights.resolve(replace(model, name="other"), "random").path == path
    names = {checkpoints.folder_name(m, s) for m, s in ((model, 0), (model, 1), (replace(model, rope_theta=1e4), 0))}
    assert len(names) == 3


def test_concurrent_writers_write_once(monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    write = checkpoints.write_checkpoint
    monkeypatch.setattr(checkpoints, "write_checkpoint", lambda *a: (written.append(1), write(*a)))
    threads = [threading.Thread(target=checkpoints.random_checkpoint, args=(tiny(), 0)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(written) == 1


def test_a_writer_that_dies_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(_bytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoints.random_checkpoint(tiny(), 0, progress=die)
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []
    (tmp_path / f"cache/.partial-{checkpoints.folder_name(tiny(), 0)}").mkdir()  # as after a kill
    assert (checkpoints.random_checkpoint(tiny(), 0) / "model.safetensors").is_file()


def test_a_cache_that_cannot_be_written_is_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"Cannot write the random checkpoint .* set HARNESS_CACHE"):
        weights.resolve(tiny(), "random")


def test_auto_offline_is_random_with_a_notice() -> None:
    found = weights.resolve(tiny(hub_id="someone/tiny"), "auto", seed=5)
    assert (found.source, found.seed) == ("random", 5)
    assert "someone/tiny" in found.notice and "\n" not in found.notice


def test_auto_without_a_hub_repository_is_random() -> None:
    found = weights.resolve(tiny(), "auto")
    assert found.source == "random" and "no published" in found.notice


def test_auto_takes_the_hubs_cache(tmp_path: Path) -> None:
    commit = "a" * 40
    repository = tmp_path / "hub/models--someone--tiny"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    checkpoints.write_checkpoint(tiny(), 0, snapshot)
    found = weights.resolve(tiny(hub_id="someone/tiny"), "auto")
    assert (found.source, found.path, found.seed) == ("hub-cache", snapshot, None)
    (snapshot / "model.safetensors").unlink()  # a download that was cut off
    assert weights.resolve(tiny(hub_id="someone/tiny"), "auto").source == "random"


def test_auto_downloads_what_is_not_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "snapshot"
    folder.mkdir()

    def snapshot_download(hub_id: str, local_files_only: bool = False, **_: object) -> str:
        if local_files_only:
            raise FileNotFoundError(hub_id)
        checkpoints.write_checkpoint(tiny(), 0, folder)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: None)
    found = weights.resolve(tiny(hub_id="someone/tiny"), "auto")
    assert (found.source, found.path) == ("download", folder)


def test_a_local_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    checkpoints.write_checkpoint(tiny(), 0, tmp_path)
    found = weights.resolve(tiny(), str(tmp_path))
    assert (found.path, found.source, found.notice, found.seed) == (tmp_path, "local", "", None)


def test_a_folder_that_is_no_checkpoint_is_bad_input(tmp_path: Path) -> None:
    def says(text: str) -> None:
        with pytest.raises(InputError, match=text):
            weights.resolve(tiny(), str(tmp_path))

    with pytest.raises(InputError, match="There is no folder"):
        weights.resolve(tiny(), str(tmp_path / "absent"))
    says("has no config.json")
    (tmp_path / "config.json").write_text("{")
    says("Cannot read .*config.json")
    (tmp_path / "config.json").write_text("{}")
    says("has no model.safetensors")
    (tmp_path / weights.INDEX).write_text(json.dumps({"weight_map": {"x": "model-00001-of-00002.safetensors"}}))
    says("has no model-00001-of-00002.safetensors")
    (tmp_path / weights.INDEX).unlink()
    checkpoints.write_checkpoint(tiny(hidden_size=64), 0, tmp_path)
    says("not of model tiny: its hidden_size is 64, not 96")
