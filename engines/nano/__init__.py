"""A small, readable engine of nano-vLLM's design."""

from engines.base import SamplingParams
from engines.nano.engine import LLM

__all__ = ["LLM", "SamplingParams"]
