#!/usr/bin/env bash
# Measures what results/reference/ holds, on this machine's GPU:
#
#   scripts/reference_runs.sh PART...      parts: compare latency throughput grid, or all
#
# compare     nano_vllm, nano and vLLM's serving arms taking turns; nano and fused taking turns
# latency     single steps of vllm, nano and fused, with layers
# throughput  nano-vLLM's 256 requests, each engine
# grid        single steps to 4,096 tokens and 256 sequences, vllm and nano
#
# Results go to $RESULTS (results/reference-runs); `python scripts/reference_refresh.py` makes them small enough to
# commit. Needs vllm, and for compare nano-vLLM. PYTHON names the interpreter, ROUNDS and LAUNCHES how much is compared,
# WEIGHTS the checkpoint (random), DRY_RUN=1 only prints the commands. A part that fails does not stop the next one.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-.venv/bin/python}
results=${RESULTS:-results/reference-runs}
common=(weights="${WEIGHTS:-random}" results="$results")
failed=0

run() {
  printf '+ %s\n' "$*"
  if [[ -z ${DRY_RUN:-} ]]; then "$@" || failed=1; fi
}

part() {
  case $1 in
    compare)
      # Four engines share the GPU; with a fifth, their caches would be too small for the 256 requests.
      engines='engines=[nano_vllm,nano,vllm:serve_arm=default,vllm:serve_arm=inproc_async]'
      run "$python" -m harness.compare "$engines" baseline=nano_vllm workload=full rounds="${ROUNDS:-6}" \
        launches="${LAUNCHES:-1}" into="$results/compare" "${common[@]}"
      run "$python" -m harness.compare 'engines=[nano,fused]' workload=full rounds="${ROUNDS:-6}" \
        launches="${LAUNCHES:-1}" into="$results/compare-fused" "${common[@]}"
      ;;
    latency) run "$python" -m harness -m engine=vllm,nano,fused workload=latency "${common[@]}" ;;
    throughput) run "$python" -m harness -m engine=vllm,nano,fused workload=throughput "${common[@]}" ;;
    grid)
      run "$python" -m harness -m engine=vllm,nano workload=grid instrument.eager=false instrument.graph=false \
        "${common[@]}"
      ;;
    *) echo "There is no part $1; the parts are compare, latency, throughput, grid and all." >&2; exit 2 ;;
  esac
}

if (($# == 0)); then
  sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"
  exit 0
fi
[[ $* == all ]] && set -- compare latency throughput grid
for name in "$@"; do part "$name"; done
exit "$failed"
