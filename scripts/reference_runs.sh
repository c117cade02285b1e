#!/usr/bin/env bash
# Measures what results/reference/ holds, on this machine's GPU:
#
#   scripts/reference_runs.sh PART...      parts: compare ablation ops latency throughput grid trial, or all
#
# compare     nano_vllm, nano, fused and vLLM's serving arms taking turns
# ablation    fused without each of its features beside all of them, and with each alone beside none
# ops         RMSNorm and the linear layer after it, fused and not, from 1 to 16,384 rows
# latency     single steps of vllm, nano and fused, with layers
# throughput  nano-vLLM's 256 requests, each engine
# grid        single steps to 4,096 tokens and 256 sequences, vllm and nano
# trial       whether harness.regress calls the same slower, and finds 3 % planted into a step
#
# Results go to $RESULTS (results/reference-runs); `python scripts/reference_refresh.py` makes them small enough to
# commit, and trial's regress-trial.json is so already. Needs vllm, and for compare nano-vLLM. PYTHON names the
# interpreter, ROUNDS and LAUNCHES how much is compared, TRIAL_LAUNCHES the plain launches in trial, WEIGHTS the
# checkpoint (random), SHARE and CACHE_TOKENS what each engine gets of an H200 in compare, OPS_MODEL whose shapes ops
# takes (qwen3-0.6b, or all), DRY_RUN=1 only prints the commands. A part that fails does not stop the next one.
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

ablate() {
  run "$python" -m harness.compare "$@" workload=ablation rounds="${ROUNDS:-4}" launches="${LAUNCHES:-1}" \
    limits.kv_cache_tokens=69632 "${common[@]}"
}

part() {
  case $1 in
    compare)
      # A cache of one size for the engines that can be given one; nano-vLLM and vLLM take what such a share leaves.
      own=limits.kv_cache_tokens=null
      engines="engines=[nano_vllm:$own,nano,fused,vllm:serve_arm=default:$own,vllm:serve_arm=inproc_async:$own]"
      run "$python" -m harness.compare "$engines" baseline=nano workload=full rounds="${ROUNDS:-6}" \
        launches="${LAUNCHES:-1}" into="$results/compare" limits.gpu_memory_utilization="${SHARE:-0.18}" \
        limits.kv_cache_tokens="${CACHE_TOKENS:-214016}" "${common[@]}"
      ;;
    ablation)
      # A few at a time: they start together, and each takes some 15 GB while its output is verified.
      mapfile -t features < <("$python" -c 'from engines.fused.features import FEATURES; print(*FEATURES, sep="\n")')
      for ((first = 0; first < ${#features[@]}; first += 5)); do
        without='' alone=''
        for feature in "${features[@]:first:5}"; do
          without+=",fused:features=[-$feature]"
          alone+=",fused:features=[$feature]"
        done
        ablate "engines=[fused$without]" into="$results/ablation-without-$first"
        ablate "engines=[fused:features=[]$alone]" into="$results/ablation-alone-$first"
      done
      ;;
    ops) run "$python" -m harness.ops op=rms_norm_linear model="${OPS_MODEL:-qwen3-0.6b}" results="$results" ;;
    latency) run "$python" -m harness -m engine=vllm,nano,fused workload=latency "${common[@]}" ;;
    throughput) run "$python" -m harness -m engine=vllm,nano,fused workload=throughput "${common[@]}" ;;
    grid)
      run "$python" -m harness -m engine=vllm,nano workload=grid instrument.eager=false instrument.graph=false \
        "${common[@]}"
      ;;
    trial)
      run "$python" scripts/regress_trial.py "$results/regress-trial" --launches "${TRIAL_LAUNCHES:-12}" \
        --json "$results/regress-trial.json"
      ;;
    *)
      echo "There is no part $1; the parts are compare, ablation, ops, latency, throughput, grid, trial, all." >&2
      exit 2
      ;;
  esac
}

if (($# == 0)); then
  sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"
  exit 0
fi
[[ $* == all ]] && set -- compare ablation ops latency throughput grid trial
for name in "$@"; do part "$name"; done
exit "$failed"
