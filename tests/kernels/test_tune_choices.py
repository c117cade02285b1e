"""What the tuner chose comes back as launches, in the kernel and at the rows that it was chosen for."""

from dataclasses import replace

import pytest
import torch

from kernels import _tune_products as products
from kernels import choices
from kernels.decode_attention_launch import Launch as AttentionLaunch
from kernels.decode_attention_launch import best_launch as best_attention
from kernels.decode_head import Launch as HeadLaunch
from kernels.decode_head import best_launch as best_head
from kernels.decode_head import default_launch as default_head
from kernels.decode_head import shape_key as head_key
from kernels.decode_linear_launch import Launch, best_launch, best_prefill_gate_up, default_launch, shape_key
from kernels.prefill_linear import Launch as PrefillLaunch
from kernels.prefill_linear import best_launch as best_prefill

CPU = torch.device("cpu")


def test_choices_of_the_head_come_back(gpu):
    """In one kernel, as a product, behind a norm, or by cuBLAS."""
    entry = products.Found("head", 0, "", 0, [(70.0, None)], cublas_us=90.0).choice
    product = HeadLaunch(product=Launch("matrix", 16, 128, 4, block_m=16))
    tiles = HeadLaunch(tiles=PrefillLaunch(64, 128, 64, 4, 7, per_sm=2))
    launches = {1: HeadLaunch(128, 8, 3), 16: product, 64: tiles, 128: None}
    table = {head_key(rows, 99, 16): entry(launch) for rows, launch in launches.items()}
    choices.save(gpu, {"decode_head": table}, {"gpu": "Some GPU"})
    assert {rows: best_head(rows, 99, 16, 2, gpu) for rows in launches} == launches
    assert best_head(33, 99, 16, 2, gpu) == tiles and best_head(32, 99, 16, 2, gpu) == default_head(16, 2)


def test_choices_come_back(gpu):
    launch = Launch("tiled", 32, 128, 4, block_m=16, num_stages=5)
    entry = products.Found("o", 16, "", 0, [(2.0, launch)], cublas_us=3.0).choice
    key, lost = shape_key(16, 1024, 2048, False), shape_key(64, 1024, 2048, False)
    choices.save(gpu, {"decode_linear": {key: entry(launch), lost: entry(None)}}, {"gpu": "Some GPU"})
    assert best_launch(9, 1024, 2048, False, 2, gpu) == launch  # 9 to 16 rows share an entry
    assert best_launch(40, 1024, 2048, False, 2, gpu) is None  # cuBLAS won
    assert best_launch(17, 1024, 2048, False, 2, gpu) == default_launch(17, 1024, 2048, False, 2)
    assert best_launch(16, 1024, 2048, True, 2, gpu) == default_launch(16, 1024, 2048, True, 2)
    assert best_launch(16, 1024, 2048, False, 4, gpu) == default_launch(16, 1024, 2048, False, 4)
    with choices.none_chosen():
        assert best_launch(40, 1024, 2048, False, 2, gpu) == default_launch(40, 1024, 2048, False, 2)
    apart = replace(launch, halves=False)
    choices.save(gpu, {"decode_linear": {shape_key(128, 1024, 2048, False): entry(apart)}}, {"gpu": "Some GPU"})
    assert best_launch(128, 1024, 2048, False, 2, gpu) == apart and not apart.halves
    before = choices.fingerprint(gpu)
    # A later run of one shape keeps the others.
    choices.save(gpu, {"decode_linear": {lost: entry(launch)}}, {"gpu": "Some GPU"})
    assert before and choices.fingerprint(gpu) not in ("", before)
    assert choices.fingerprint(CPU) == ""
    assert best_launch(40, 1024, 2048, False, 2, gpu) == best_launch(9, 1024, 2048, False, 2, gpu) == launch


def test_rows_between_powers_of_two_may_have_a_measurement_of_their_own(gpu):
    """And have the next power's where there is none, each kernel for itself."""
    between, power = (Launch("tiled", 32, 128, 4, block_m=16, num_stages=stages) for stages in (3, 5))
    measured = {96: between, 128: power}
    entries = {f"1024x2048 rows {rows}": {"launch": choices.fields_of(launch)} for rows, launch in measured.items()}
    choices.save(gpu, {"decode_linear": entries}, {"gpu": "Some GPU"})
    found = {rows: best_launch(rows, 1024, 2048, False, 2, gpu) for rows in (65, 96, 97, 128)}
    assert found == {65: between, 96: between, 97: power, 128: power}
    attention = AttentionLaunch(32, 1, 256, 1, True, 3)
    entries = {"16/8x128 rows 128": {"launch": choices.fields_of(attention)}}
    choices.save(gpu, {"decode_attention": entries}, {"gpu": "Some GPU"})
    assert best_attention(80, 16, 8, 128, 4096, 2, gpu) == attention
    counts = {rows: choices.rows_measured(rows) for rows in (1, 3, 32, 33, 48, 49, 64, 65, 100, 129, 192, 193, 257)}
    assert counts == {
        1: (1,), 3: (4,), 32: (32,), 33: (48, 64), 48: (48, 64), 49: (64,), 64: (64,), 65: (96, 128), 100: (128,),
        129: (192, 256), 192: (192, 256), 193: (256,), 257: (512,),
    }  # fmt: skip


def test_prefills_kernel_may_be_decodes_choice(gpu):
    """The entry says so and how; what it says of others is none of decode_linear's launches."""
    launch = PrefillLaunch(64, 64, 64, 4, 3, per_sm=0)
    found = products.Found("gate_up", 256, shape_key(256, 3072, 1024, True), 0, [(7.0, launch)], cublas_us=9.0)
    choices.save(gpu, {"decode_linear": {found.key: found.choice(launch)}}, {"gpu": "Some GPU"})
    shape = 3072, 1024, True, 2, gpu
    assert best_prefill_gate_up(129, *shape) == launch and best_launch(129, *shape) is None
    assert best_prefill_gate_up(128, *shape) is None and best_launch(128, *shape) == default_launch(128, *shape[:-1])
    assert choices.chosen("decode_linear", found.key, gpu)["us"] == 7.0
    choices.save(gpu, {"decode_linear": {found.key: found.choice(None)}}, {"gpu": "Some GPU"})
    assert best_prefill_gate_up(129, *shape) is None and best_launch(129, *shape) is None


@pytest.mark.parametrize(("kernel", "key", "best"), [
    ("decode_attention", "16/8x128 rows 1", lambda gpu: best_attention(1, 16, 8, 128, 4096, 2, gpu)),
    ("decode_linear", "8x16 rows 1", lambda gpu: best_launch(1, 8, 16, False, 2, gpu)),
    ("decode_head", "99x16 rows 1", lambda gpu: best_head(1, 99, 16, 2, gpu)),
    ("prefill_gate_up", "8x16 rows 1", lambda gpu: best_prefill("prefill_gate_up", 8, 16, 1, torch.bfloat16, gpu)),
], ids=["attention", "linear", "head", "prefill"])  # fmt: skip
def test_choices_of_another_version_are_refused_with_the_way_out(gpu, kernel, key, best):
    choices.save(gpu, {kernel: {key: {"launch": {"gone": 1}}}}, {"gpu": "Some GPU"})
    with pytest.raises(ValueError, match=r"some-gpu\.json .* measure again"):
        best(gpu)
