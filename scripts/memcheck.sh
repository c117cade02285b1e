#!/usr/bin/env bash
set -euo pipefail
usage() {
  cat <<'TEXT'
compute-sanitizer over the fused engine's kernels on tiny shapes, summarised to one line.

    scripts/memcheck.sh all            every test of tests/gpu/test_tiny_steps.py
    scripts/memcheck.sh bfloat16       those whose name holds this (pytest -k)

Every tensor gets memory of its own, so that an access beyond it is found and not lost in torch's pool. Captured graphs
cannot run so; the tests launch the same kernels one by one.

From the environment:
    TOOL=memcheck       or racecheck, initcheck, synccheck
    LOG                 where the tool's log stays (default: a temporary file that goes away)
    JSON                a file for the outcome, small enough to commit
    SANITIZER           default: compute-sanitizer
    PYTHON              default: .venv/bin/python if there is one, else python3

Exit codes: 0 no error, 1 errors or failed tests, 2 it cannot be done.
TEXT
}

case "${1:-}" in "" | -h | --help) usage; exit 0 ;; esac
[[ $# -eq 1 ]] || { echo "One name, please; see scripts/memcheck.sh --help." >&2; exit 2; }
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
[[ -n ${PYTHON:-} || ! -x .venv/bin/python ]] || python=.venv/bin/python
sanitizer=${SANITIZER:-compute-sanitizer}
command -v "$sanitizer" > /dev/null || { echo "There is no $sanitizer; it comes with the CUDA toolkit." >&2; exit 2; }
tool=${TOOL:-memcheck}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
log=${LOG:-$folder/log}
chosen=()
[[ $1 == all ]] || chosen=(-k "$1")

code=0
PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" --log-file "$log" --print-limit 20 \
  "$python" -m pytest -q -p no:cacheprovider tests/gpu/test_tiny_steps.py "${chosen[@]}" > "$folder/tests" 2>&1 || code=$?
tests=$(grep -E '^(=+ )?[0-9]+ (passed|failed|skipped|error|deselected)' "$folder/tests" | tail -n 1 | tr -d '=' || true)
summary=$(grep -o 'ERROR SUMMARY: .*' "$log" 2> /dev/null | tail -n 1 || true)
[[ $code -eq 0 ]] || tail -n 40 "$folder/tests"
echo "$tool: ${summary:-no summary}; tests: ${tests:-none}"
[[ -z ${JSON:-} ]] || "$python" - "$JSON" "$tool" "$1" "${summary:-no summary}" "$tests" "$code" <<'PYTHON'
import sys
from pathlib import Path

from harness import machine
from harness.results import write_json

file, *told, code = sys.argv[1:]
Path(file).parent.mkdir(parents=True, exist_ok=True)
made = dict(zip(("tool", "chosen", "summary", "tests"), map(str.strip, told)))
provenance = machine.provenance()
device = provenance["gpu"]["name"] if provenance["gpu"] else provenance["cpu"]["model"]
write_json(Path(file), {"device": device, "provenance": provenance, **made, "exit_code": int(code)})
PYTHON
# A run that checked nothing is no success.
[[ $code -eq 0 && $tests == *passed* && $summary == 'ERROR SUMMARY: 0 errors'* ]] || exit 1
