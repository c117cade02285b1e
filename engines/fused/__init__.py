"""nano with fused Triton kernels."""

from engines.base import SamplingParams
from engines.fused.engine import LLM

__all__ = ["LLM", "SamplingParams"]
