"""The GPU worker of the arm `python_graph`: hooks are on the model before its decode graphs are captured.

vLLM imports this module by its dotted path (`worker_cls`). That happens in this process, so a variable of the module
hands over the probe.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.gpu_worker import Worker

from engines.base import Probe
from engines.vllm.layers import hook_runner

PATH = f"{__name__}.TracedWorker"
pending: list[Probe] = []
"""The probe for the worker that is started next; taken out when its hooks are on."""


class TracedWorker(Worker):
    """vLLM's worker, with the pending probe's hooks put on before it captures its decode graphs.

    Not as early as in `load_model`: vLLM captures a few graphs before, to see what they weigh, and throws them away.
    """

    def compile_or_warm_up_model(self) -> Any:
        while pending:
            hook_runner(self.model_runner, pending.pop())
        return super().compile_or_warm_up_model()
