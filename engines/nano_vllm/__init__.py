"""Upstream nano-vLLM, unchanged, behind the common protocol. https://github.com/GeeeekExplorer/nano-vllm"""

from engines.nano_vllm.engine import NanoVLLM

__all__ = ["NanoVLLM"]
