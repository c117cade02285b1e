"""Tables of engines that took turns, from comparisons whose rounds have chosen values."""

import json
from pathlib import Path

from scripts.tables import comparison
from scripts.tables.sources import MODELS
from tests.scripts.table_runs import block, cells, compared


def test_a_row_shows_the_fastest_arm_of_vllm_and_default_beside_it(tmp_path: Path) -> None:
    serve = {"metric": "output_tok_s", "phase": "serve", "batch_size": 9, "tokens": 0, "output_len": 0}
    times = {  # TPOT in ms, output tok/s
        "nano_vllm": (2.0, 100), "nano": (1.0, 200), "vllm": (4.0, 300), "vllm:serve_arm=inproc_async": (3.0, 150),
        "vllm:serve_arm=inproc:limits.kv_cache_tokens=64": (3.5, 120), "fused": (0.5, 400),
    }  # fmt: skip
    blocks_of = {
        label: [block(label, n, ms) for n in range(2)]
        + [block(label, n, rate, **serve, started_s=10.0 + n) for n in range(2)]
        for label, (ms, rate) in times.items()
    }
    made = comparison.comparison(compared(tmp_path / "all", blocks_of))
    assert made.splitlines()[0] == "| small | nano_vllm | nano | vllm, its fastest arm | vllm default | fused |"
    assert cells(made)[0] == [
        "decode, batch 8, prompt 128, TPOT ms", "2.00 (2.00 to 2.00)", "1.00 (1.00 to 1.00), 0.50× (0.50 to 0.50)",
        "3.00 (3.00 to 3.00), 1.50× (1.50 to 1.50), inproc_async", "4.00 (4.00 to 4.00), 2.00× (2.00 to 2.00)",
        "0.50 (0.50 to 0.50), 0.25× (0.25 to 0.25)",
    ]  # fmt: skip
    assert cells(made)[1][3:5] == [
        "300 (300 to 300), 3.00× (3.00 to 3.00), default",
        "300 (300 to 300), 3.00× (3.00 to 3.00)",
    ]
    assert "interval within these processes" in made
    again = comparison.comparison(compared(tmp_path / "again", blocks_of, launches=3))
    assert "interval within" not in again

    # an arm that fails in one row, another one that never came, one that left, and rounds that have no interval
    failed = block("vllm", 0, 0.0, status="out of memory") | {"value": None}
    few = {label: blocks_of[label] for label in ("nano_vllm", "nano")}
    few["nano"] = few["nano"][:1] + few["nano"][2:]
    few |= {"vllm:serve_arm=inproc": [failed], "vllm:serve_arm=default": blocks_of["vllm"][2:]}
    reasons = {"vllm:serve_arm=inproc": "it fell", "nano": "it left", "fused": "no fuse"}
    text = comparison.comparison(compared(tmp_path / "few", few, engines=[*few, "fused"], reasons=reasons))
    assert text.splitlines()[0] == "| small | nano_vllm | nano | vllm:serve_arm=default |"
    assert cells(text)[0][2:] == ["1.00 (1.00 to 1.00), 0.50× (one pair)", "not measured"]
    assert "vllm:serve_arm=inproc took no part: it fell" in text
    assert "nano left before the end: it left" in text
    assert "fused took no part: no fuse" in text


def test_a_comparison_by_hand(tmp_path: Path) -> None:
    values = {"A": (1.0, 2.0, 4.0), "B": (2.0, 4.0, 8.0)}
    blocks_of = {label: [block(label, n, value) for n, value in enumerate(of)] for label, of in values.items()}
    reasons = {"C": "it has no legs"}
    made = comparison.comparison(compared(tmp_path, blocks_of, engines=["A", "B", "C"], reasons=reasons))
    assert cells(made)[0] == [
        "decode, batch 8, prompt 128, TPOT ms", "2.00 (1.00 to 4.00)", "4.00 (2.00 to 8.00), 2.00× (2.00 to 2.00)"
    ]  # fmt: skip
    assert "ratios to A are" in made
    assert "One Toy, small, float16, local weights" in made
    assert "C took no part: it has no legs" in made


def test_a_comparison_tells_limits_by_the_caches_that_they_gave(tmp_path: Path) -> None:
    labels = ("nano:limits.kv_cache_tokens=8:limits.max_num_seqs=2", "fused")
    folder = Path(compared(tmp_path, {label: [block(label, 0, 1.0)] for label in labels}))
    for label, tokens in zip(labels, (12_345, 678), strict=True):
        (path,) = folder.glob(f"*/{label.replace(':', '-')}/run.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | {"capacity": {"kv_cache_tokens": tokens}}))
    made = comparison.comparison(str(folder))
    assert made.splitlines()[0] == "| small | nano | fused |"
    assert "Tokens in the cache: nano 12,345, fused 678." in made


def test_other_models_by_hand(tmp_path: Path) -> None:
    assert comparison.models(str(tmp_path)) == "Not measured yet (`scripts/reference_runs.sh models`)."
    prefill = {"metric": "generate_ms", "phase": "prefill", "batch_size": 1, "tokens": 1024, "output_len": 1}
    times = {"nano": [2.0, 4.0], "fused:limits.kv_cache_tokens=8": [1.0, 1.0]}
    big = {
        label: [block(label, n, ms) for n, ms in enumerate(of)]
        + [block(label, n, 10 * ms, **prefill, started_s=10.0 + n) for n, ms in enumerate(of[:1])]
        for label, of in times.items()
    }
    # Ratios there refer to fused.
    wide = {label: [block(label, n, ms) for n in range(2)] for label, ms in (("fused", 3.0), ("hf", 9.0), ("nano", 4))}
    compared(tmp_path / "compare-big", big, model={"name": "big"})
    compared(tmp_path / "compare-wide", wide, model={"name": "wide"}, reasons={"hf": "it was slow"}, launches=3)
    compared(tmp_path / "compare-ours", wide, model={"name": MODELS[0]})
    compared(tmp_path / "ablation", {"fused": wide["fused"], "fused:features=[]": []}, model={"name": "big"})
    made = comparison.models(str(tmp_path))
    assert made.splitlines()[0] == "| model | work | nano | fused | hf | fused / nano |"
    decode = "decode, batch 8, prompt 128, TPOT ms"
    assert cells(made) == [
        # logarithms of ratios: -ln 2 and -ln 4, whose mean is that of √⅛; half an interval 12.706 × 0.3466 = ln 81.75
        ["big", decode, "3.00 (2.00 to 4.00)", "1.00 (1.00 to 1.00)", "–", "0.35× (0.00 to 28.90)"],
        ["big", "prefill, 1 × 1024 tokens, ms", "20.00 (20.00 to 20.00)", "10.00 (10.00 to 10.00)", "–",
         "0.50× (one pair)"],
        ["wide", decode, "4.00 (4.00 to 4.00)", "3.00 (3.00 to 3.00)", "9.00 (9.00 to 9.00)", "0.75× (0.75 to 0.75)"],
    ]  # fmt: skip
    assert "interval within these processes. TPOT" in made
    assert "big: one Toy, float16, local weights, 2 rounds, launched 1 time(s). Runs: `" in made
    assert "wide: one Toy, float16, local weights, 2 rounds, launched 3 time(s). Runs: `" in made
    assert made.endswith("wide: hf left before the end, or took no part: it was slow")
