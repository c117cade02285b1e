"""Tables of what tuners chose, from the committed file and from made-up ones, and which models were tuned for."""

import json
import re
from pathlib import Path

import pytest

from scripts.tables import choices
from tests.scripts.table_runs import cells


def test_decode_choices_say_which_way_runs() -> None:
    """The committed file, read by hand: who is in bold is who was faster."""
    measured = json.loads((choices.ROOT / "kernels/choices/nvidia-h200.json").read_text())["choices"]
    rows = {(row[0], row[1]): row[2:] for row in cells(choices.decode_choices())}
    few = measured["decode_linear"]["4096x1024 rows 1"]
    assert rows["input_norm+qkv_proj", "1"] == [f"**{few['us']:.1f}**", f"{few['cublas_us']:.1f}", "vector"]
    many = measured["decode_linear"]["gated 3072x1024 rows 256"]
    assert many["path"] == "prefill" and many["us"] < many["cublas_us"]
    assert rows["post_norm+gate_up_proj+silu_mul", "256"] == [
        f"**{many['us']:.1f}**", f"{many['cublas_us']:.1f}", "prefill's"
    ]  # fmt: skip
    assert measured["decode_head"]["151936x1024 rows 1"]["launch"]["product"]["kernel"] == "vector"
    assert rows["final_norm+lm_head", "1"][2] == "vector"


def test_prompts_attention_beside_flash_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Worked out by hand: 2 × 2,048 × 1,000 × 1,001 operations in 10 µs, and who runs in bold."""
    made = {
        "facts": {"gpu": "Toy"},
        "choices": {
            "causal_attention": {
                "16/8x128 tokens 1000 of at most 1000": {
                    "launch": {"block_t": 8}, "us": 10.0, "flash_attention_us": 12.5, "date": "2030-01-01"
                },
                "16/8x128 tokens 4000 of at most 1000": {
                    "path": "flash_attention", "us": 50.0, "flash_attention_us": 40.0, "date": "2030-01-02"
                },
                "32/8x128 tokens 1000 of at most 1000": {
                    "path": "flash_attention", "us": 5.0, "flash_attention_us": 4.0, "date": "2030-01-03"
                },
            }
        },
    }  # fmt: skip
    (tmp_path / "kernels/choices").mkdir(parents=True)
    (tmp_path / "kernels/choices/toy.json").write_text(json.dumps(made))
    monkeypatch.setattr(choices, "ROOT", tmp_path)
    assert cells(choices.causal_choices("toy")) == [
        ["1 × 1,000", "**10.0**", "12.5", "0.80×", "410"], ["4 × 1,000", "50.0", "**40.0**", "1.25×", "410"]
    ]  # fmt: skip


def test_which_other_models_were_tuned_for() -> None:
    """docs/10 says so below the comparisons of other models."""
    measured = json.loads((choices.ROOT / "kernels/choices/nvidia-h200.json").read_text())["choices"]
    small = {"4096x1024", "1024x2048", "gated 3072x1024", "1024x3072", "151936x1024", "16/8x128", "6144x1024"}
    larger = {"6144x2560", "2560x4096", "gated 9728x2560", "2560x9728", "151936x2560", "32/8x128"}
    keys = [re.split(" rows | tokens ", key) for table in measured.values() for key in table]
    assert {shape for shape, _ in keys} == small | larger
    assert {rows.removesuffix(" short") for shape, rows in keys if shape in larger} == {"8", "32"}
    text = (choices.ROOT / "docs/10_benchmark_comparison.md").read_text()
    assert "Qwen3-4B has been measured at 8 and 32 rows" in " ".join(text.split())


def test_what_decode_uses_need_not_be_faster_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was chosen in a whole step."""
    launch, day = {"kernel": "tiled", "halves": False}, "2030-01-01"
    made = {
        "facts": {"gpu": "Toy", "torch": "9", "triton": "9"},
        "choices": {
            "decode_linear": {
                "4096x1024 rows 128": {"launch": launch, "us": 8.0, "cublas_us": 7.0, "date": day},
                "4096x1024 rows 256": {"path": "cublas", "us": 6.0, "cublas_us": 7.0, "date": day},
                "gated 3072x1024 rows 256": {
                    "path": "prefill", "launch": {"block_m": 64}, "us": 6.0, "cublas_us": 7.0, "date": day
                },
            },
            "decode_head": {
                "151936x1024 rows 64": {
                    "launch": {"tiles": {"block_m": 64}}, "us": 80.0, "cublas_us": 90.0, "date": day
                },
                "151936x1024 rows 256": {"path": "cublas", "us": 150.0, "cublas_us": 140.0, "date": day},
            },
        },
    }  # fmt: skip
    (tmp_path / "kernels" / "choices").mkdir(parents=True)
    (tmp_path / "kernels" / "choices" / "toy.json").write_text(json.dumps(made))
    monkeypatch.setattr(choices, "ROOT", tmp_path)
    assert cells(choices.decode_choices("toy")) == [
        ["input_norm+qkv_proj", "128", "8.0", "**7.0**", "tiled"],
        ["input_norm+qkv_proj", "256", "**6.0**", "7.0", "library"],
        ["post_norm+gate_up_proj+silu_mul", "256", "**6.0**", "7.0", "prefill's"],
        ["final_norm+lm_head", "64", "**80.0**", "90.0", "tiles, norm apart"],
        ["final_norm+lm_head", "256", "150.0", "**140.0**", "library"],
    ]


def test_prefill_choices_say_which_way_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = {"block_m": 128, "block_n": 64, "num_warps": 8}
    made = {
        "facts": {"gpu": "Toy"},
        "choices": {
            "prefill_gate_up": {
                "6144x1024 rows 1024": {"launch": launch, "us": 20.0, "cublas_us": 25.0, "date": "2030-01-02"},
                "6144x1024 rows 2048": {"path": "cublas", "cublas_us": 40.0, "date": "2030-01-01"},
            }
        },
    }
    (tmp_path / "kernels" / "choices").mkdir(parents=True)
    (tmp_path / "kernels" / "choices" / "toy.json").write_text(json.dumps(made))
    monkeypatch.setattr(choices, "ROOT", tmp_path)
    # 2 * 1024 * 6144 * 1024 operations in 20 µs are 644.2 TFLOP/s.
    made = choices.prefill_choices("toy")
    assert "2030-01-01 to 2030-01-02" in made
    assert cells(made) == [
        ["gate_up_proj+silu_mul", "1,024", "**20.0**", "25.0", "0.80×", "644", "128 × 64, 8 warps"],
        ["gate_up_proj+silu_mul", "2,048", "", "**40.0**", "", "", "cuBLAS, `silu_mul`"],
    ]
