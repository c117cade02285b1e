"""Llama 3.x: neither head norms nor biases; its rotary scaling stands in the checkpoint's config."""

from engines.nano.models.decoder import Family

LLAMA = Family(qk_norm=False, qkv_bias=False)
