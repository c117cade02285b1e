#!/usr/bin/env bash
set -euo pipefail
usage() {
  cat <<'TEXT'
Whether this checkout is slower on this machine's GPU than what is committed in results/reference/<gpu>/.

    scripts/gpu_check.sh NEW        NEW: a folder that does not exist yet, such as results/checks/today

1. python -m harness.doctor
2. pytest tests/gpu
3. LAUNCHES times: python -m harness -m engine=ENGINES model=MODEL workload=WORKLOAD, into NEW
4. python -m harness.regress REFERENCE NEW, with its summary in NEW/regress.md and its rows in NEW/regress.json

From the environment:
    ENGINES=nano,fused  MODEL=qwen3-0.6b  WORKLOAD=latency  LAUNCHES=3  PRESET=default
    REFERENCE           default: results/reference/ and the GPU's name
    PYTHON              default: .venv/bin/python if there is one, else python3
    DRY_RUN=1           print the commands and run none

Exit codes: those of harness.regress (0 nothing is slower, 1 something is, 2 the two cannot be compared, 3 too much is
unsure); 2 also where NEW exists or REFERENCE does not; 4 if a step before it failed.
TEXT
}

case "${1:-}" in "" | -h | --help) usage; exit 0 ;; esac
[[ $# -eq 1 ]] || { echo "One folder, please; see scripts/gpu_check.sh --help." >&2; exit 2; }
new=$(realpath -m "$1")
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
[[ -n ${PYTHON:-} || ! -x .venv/bin/python ]] || python=.venv/bin/python
reference=${REFERENCE:-results/reference/$("$python" -c "from harness.machine import machine_slug; print(machine_slug())")}

run() {
  printf '+'; printf ' %q' "$@"; echo
  [[ -n ${DRY_RUN:-} ]] || "$@"
}

if [[ -z ${DRY_RUN:-} ]]; then
  [[ -n ${REFERENCE:-} || $reference != results/reference/cpu ]] || { echo "There is no GPU here to check." >&2; exit 2; }
  [[ ! -e $new ]] || { echo "$new exists; name a new folder." >&2; exit 2; }
  [[ -d $reference ]] || { echo "There is no $reference to compare with (scripts/reference_refresh.py makes it)." >&2; exit 2; }
fi

run "$python" -m harness.doctor || exit 4
run "$python" -m pytest -q tests/gpu || exit 4
for ((launch = 0; launch < ${LAUNCHES:-3}; launch++)); do
  run "$python" -m harness -m "engine=${ENGINES:-nano,fused}" "model=${MODEL:-qwen3-0.6b}" \
    "workload=${WORKLOAD:-latency}" "results=$new" || exit 4
done
run "$python" -m harness.regress "$reference" "$new" --preset "${PRESET:-default}" \
  --markdown "$new/regress.md" --json "$new/regress.json"
