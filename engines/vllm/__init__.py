"""Upstream vLLM behind the common protocol: the real package, driven through its offline engine.

`package` finds it, `arms` says how it is started, `live` starts and closes one engine, `steps` reads what its scheduler
did, `serving` and `scoring` run whole requests, `layers` and `worker` let a probe see its layers, `engine` is `VLLM`.
"""

from engines.vllm.engine import VLLM

__all__ = ["VLLM"]
