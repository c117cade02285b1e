"""Train the tiny Qwen3 that the tests compare engines on, and write it to tests/assets/tiny-qwen3.

Random weights make greedy comparison fragile: their best two logits are close, so rounding picks the token. This model
learns a few pages that ship with Python by heart, so its greedy choices are far apart. Tokens are bytes. About half of
the training windows start with random tokens, after which the text starts from its beginning: random prompts have a
sharp continuation too.

    python scripts/make_tiny_checkpoint.py [--steps N] [--out FOLDER]

Takes about two minutes on two CPU cores and ends with the greedy margins. The committed folder came from this script;
texts differ a little between Python versions and sums between machines, so a new folder is as good, not the same.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import math
import random
import textwrap
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

BYTES, BOS, EOS, PAD, VOCAB = 256, 256, 257, 258, 260
WINDOW, LONG_WINDOW, BATCH_TOKENS = 160, 640, 2560
PREFIX_SHARE, MAX_PREFIX = 0.5, 96
PEAK_LR, WARMUP_STEPS, LONG_SHARE = 4e-3, 30, 0.15


def tiny_config() -> Qwen3Config:
    """The architecture: every shape differs from every other one, and hidden_size != num_heads × head_dim."""
    return Qwen3Config(
        vocab_size=VOCAB, hidden_size=96, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
        head_dim=32, intermediate_size=256, max_position_embeddings=1024, rms_norm_eps=1e-6, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, bos_token_id=BOS, eos_token_id=EOS,
        pad_token_id=PAD,
    )  # fmt: skip


def texts() -> list[str]:
    """Pages that every Python ships, in a fixed order."""
    with contextlib.redirect_stdout(io.StringIO()):
        import this
    zen = "".join(this.d.get(c, c) for c in this.s)
    return [zen, *(inspect.cleandoc(f.__doc__ or "") for f in (textwrap.dedent, textwrap.fill, textwrap.shorten))]


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose ids are byte values, with <bos>, <eos> and <pad> after them."""
    # ByteLevel writes each byte as one printable character: itself where printable, else the next free one from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(BYTES) if b not in printable]
    character = {b: chr(b) for b in printable} | {b: chr(BYTES + i) for i, b in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab={character[b]: b for b in range(BYTES)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>", "<eos>", "<pad>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>",
        clean_up_tokenization_spaces=False, model_max_length=1024,
    )  # fmt: skip


def batch(corpus: list[int], window: int, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels [rows, window]; random prefixes are not learnt (label -100)."""
    ids, labels = [], []
    for _ in range(BATCH_TOKENS // window):
        prefix, start = 0, rng.randrange(len(corpus))
        if rng.random() < PREFIX_SHARE:
            prefix, start = rng.randint(1, MAX_PREFIX), 0
        text = [corpus[(start + i) % len(corpus)] for i in range(window - prefix)]
        ids.append([rng.randrange(VOCAB) for _ in range(prefix)] + text)
        labels.append([-100] * prefix + text)
    return torch.tensor(ids), torch.tensor(labels)


def train(steps: int) -> Any:
    """A `Qwen3ForCausalLM`; its own annotations refuse plain calls of its methods, hence Any."""
    torch.manual_seed(0)
    rng = random.Random(0)
    corpus = [token for text in texts() for token in (*text.encode(), EOS)]
    model: Any = Qwen3ForCausalLM(tiny_config())
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.01)
    for step in range(steps):
        progress = max(0, step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
        lr = PEAK_LR * min(1, (step + 1) / WARMUP_STEPS) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        # Long windows at the end teach the positions that short ones never reach.
        ids, labels = batch(corpus, LONG_WINDOW if progress > 1 - LONG_SHARE else WINDOW, rng)
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:4d}  loss {loss.item():.3f}", flush=True)
    return model.eval()


def margins(model: Any) -> torch.Tensor:
    """Greedy margin (best minus second logit) of 64 tokens after each of 24 prompts of random tokens or text."""
    rng = random.Random(1)
    corpus = [token for text in texts() for token in (*text.encode(), EOS)]
    found = []
    for i in range(24):
        length, start = rng.randint(5, 200), rng.randrange(len(corpus) - 200)
        prompt = [rng.randrange(VOCAB) for _ in range(length)] if i % 2 else corpus[start : start + length]
        out = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=64, eos_token_id=None, pad_token_id=PAD,
            output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
        best = torch.cat(out.scores).topk(2).values
        found.append(best[:, 0] - best[:, 1])
    return torch.cat(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "tests" / "assets" / "tiny-qwen3")
    args = parser.parse_args()
    model = train(args.steps).to(torch.bfloat16)
    model.generation_config.eos_token_id = EOS
    model.save_pretrained(args.out)
    byte_level_tokenizer().save_pretrained(args.out)
    model = Qwen3ForCausalLM.from_pretrained(args.out, dtype=torch.float32).eval()
    margin = margins(model)
    low = [f"{q:.0%}: {margin.quantile(q):.2f}" for q in (0.0, 0.01, 0.05, 0.25, 0.5)]
    print(f"greedy margin over {len(margin)} tokens, quantiles {', '.join(low)}")
    size = sum(f.stat().st_size for f in args.out.iterdir())
    print(f"{args.out}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
