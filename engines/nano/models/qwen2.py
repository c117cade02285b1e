"""Qwen2 and Qwen2.5: the query, key and value projections have a bias."""

from engines.nano.models.decoder import Family

QWEN2 = Family(qk_norm=False, qkv_bias=True)
