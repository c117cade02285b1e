"""The other families against transformers, on random weights: biased projections, rotary scaling, untied heads."""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from engines.base import InputError
from engines.fused import LLM as Fused
from engines.nano import LLM as Nano
from engines.nano.layers.rotary import inverse_frequencies
from tests.engines import reference

SHAPE = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2,
    "intermediate_size": 80, "vocab_size": 100, "max_position_embeddings": 512, "eos_token_id": 3, "bos_token_id": 1,
}  # fmt: skip
SCALING = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def make(folder, family: str, **changes):
    """A random checkpoint of a family, saved by transformers; large weights make its outputs depend on everything."""
    torch.manual_seed(0)
    config_class = getattr(transformers, f"{family}Config")
    config = config_class(**(SHAPE | changes))
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    model.save_pretrained(folder, max_shard_size=changes.get("shard", "1GB"))
    return folder


FAMILIES = {
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": False}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "llama": ("Llama", {"rope_parameters": {"rope_theta": 10000.0, **SCALING}, "tie_word_embeddings": True}),
}


@pytest.mark.parametrize("engine", [Nano, Fused])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(tmp_path, engine, family):
    name, changes = FAMILIES[family]
    folder = make(tmp_path / family, name, **changes)
    prompts = [[5, 17, 42, 8], list(range(10, 90)), [99]]
    for scored in engine(reference.config(folder)).score(reference.requests(prompts, 5)):
        want = reference.logits(scored.prompt_token_ids, scored.token_ids, folder)
        assert (scored.logits - want).norm() / want.norm() < 2e-5


def test_llama_rotary_frequencies_equal_transformers():
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = transformers.LlamaConfig(**SHAPE, rope_parameters={"rope_theta": 500000.0, **SCALING})
    want, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    torch.testing.assert_close(inverse_frequencies(8, 500000.0, SCALING), want)


def test_sharded_checkpoint(tmp_path):
    folder = make(tmp_path / "shards", "Qwen2", shard="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    (scored,) = Nano(reference.config(folder)).score(reference.requests([[1, 2, 3]], 3))
    want = reference.logits(scored.prompt_token_ids, scored.token_ids, folder)
    assert (scored.logits - want).norm() / want.norm() < 1e-5


def damaged(tmp_path, change):
    folder = make(tmp_path / "damaged", "Qwen2")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return reference.config(folder)


def test_missing_tensor_is_named(tmp_path):
    config = damaged(tmp_path, lambda t: t.pop("model.layers.1.self_attn.k_proj.weight"))
    with pytest.raises(InputError, match=r"model\.layers\.1\.self_attn\.k_proj\.weight is missing"):
        Nano(config)


def test_misshapen_tensor_is_named(tmp_path):
    config = damaged(tmp_path, lambda t: t.update({"model.norm.weight": torch.ones(47)}))
    with pytest.raises(InputError, match=r"model\.norm\.weight .* has shape \[47\], not \[48\]"):
        Nano(config)


def test_foreign_tensor_is_named(tmp_path):
    config = damaged(tmp_path, lambda t: t.update({"model.layers.0.mystery.weight": torch.ones(4)}))
    with pytest.raises(InputError, match=r"model\.layers\.0\.mystery\.weight"):
        Nano(config)


def test_truncated_file_is_named(tmp_path):
    folder = make(tmp_path / "truncated", "Qwen2")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match="model.safetensors cannot be read"):
        Nano(reference.config(folder))


def test_parameters_are_not_drawn_before_they_are_read(tmp_path):
    """It would take longer than the reading; and the seed's first numbers are the requests'."""
    config = reference.config(make(tmp_path / "model", "Qwen2"))
    torch.manual_seed(config.seed)
    fresh = torch.get_rng_state()
    torch.rand(1)
    Nano(config)
    assert torch.equal(torch.get_rng_state(), fresh)
    linear = torch.nn.Linear(3, 3)  # and later as ever
    assert linear.weight.unique().numel() > 1
