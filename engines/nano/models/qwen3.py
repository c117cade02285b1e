"""Qwen3: query and key heads are normalised, projections have no bias."""

from engines.nano.models.decoder import Family

QWEN3 = Family(qk_norm=True, qkv_bias=False)
