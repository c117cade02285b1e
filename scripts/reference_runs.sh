#!/usr/bin/env bash
# Measures what results/reference/ holds, on this machine's GPU:
#
#   scripts/reference_runs.sh PART...     parts: compare models ablation alone ops shapes latency throughput grid trial, or all
#
# compare     nano_vllm, nano, fused and vLLM's serving arms taking turns
# models      nano and fused taking turns, a comparison of each of $MODELS (qwen3-4b), calls of few sequences
# ablation    fused without each of its features, taking turns with all of them
# alone       fused with each of its features alone, taking turns with none
# ops         RMSNorm and the linear layer after it, fused and not, from 1 to 16,384 rows
# shapes      the same at fewer numbers of rows, for the shapes of all models
# latency     single steps of vllm, nano and fused, with layers
# throughput  nano-vLLM's 256 requests, each engine
# grid        single steps to 4,096 tokens and 256 sequences, vllm and nano
# trial       whether harness.regress calls the same slower, and finds 3 % planted into a step
#
# What checks fused and studies it beside these, with a time limit each, is in scripts/reference_checks.sh.
#
# Results go to $RESULTS (results/reference-runs); `python scripts/reference_refresh.py` makes them small enough to
# commit, and trial's regress-trial.json is so already. Needs vllm, and for compare nano-vLLM, which VLLM=no and
# UPSTREAM=no leave out. PYTHON names the interpreter, ROUNDS and LAUNCHES how much is compared, TRIAL_LAUNCHES the plain
# launches in trial, WEIGHTS the checkpoint (random), SHARE and CACHE_TOKENS what an engine gets of an H200 in compare,
# TOGETHER how many engines there are at once in ablation and alone (9, each takes up to 13 GB; 2 or more), OPS_MODEL
# whose shapes ops takes (qwen3-0.6b), MODEL whose weights ablation and alone run (qwen3-0.6b), MODELS those of
# models, DRY_RUN=1 only prints the commands. A part that fails does not stop the next one.
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

# fused with these features (`[]` for none, nothing for all) and, a few at a time, with each feature below `prefix`.
# They start at once, so each gets few threads and compiles by itself (torch would give each a pool as wide as the
# machine); a small budget of tokens keeps steps, and with them memory and graphs, as small as the workload is.
ablate() {
  local reference=$1 prefix=$2 into=$3 first features engines at_once groups
  mapfile -t features < <("$python" -c 'from engines.fused.features import FEATURES; print(*FEATURES, sep="\n")')
  groups=$(((${#features[@]} + ${TOGETHER:-9} - 2) / (${TOGETHER:-9} - 1)))
  at_once=$(((${#features[@]} + groups - 1) / groups))
  for ((first = 0; first < ${#features[@]}; first += at_once)); do
    engines=$reference
    for feature in "${features[@]:first:at_once}"; do engines+=",fused:features=[$prefix$feature]"; done
    run env OMP_NUM_THREADS=2 TORCHINDUCTOR_COMPILE_THREADS=1 "$python" -m harness.compare "engines=[$engines]" \
      workload=ablation model="${MODEL:-qwen3-0.6b}" rounds="${ROUNDS:-4}" launches="${LAUNCHES:-1}" \
      into="$results/$into-$first" limits.max_num_batched_tokens=2048 limits.kv_cache_tokens=69632 "${common[@]}"
  done
}

part() {
  case $1 in
    compare)
      # Ours start together with caches of one size. The others take what such a share leaves, one after the other: when
      # vLLM's two arms were given a size and started together, they did not come to an end of it in five minutes.
      own=limits.kv_cache_tokens=null
      engines="nano,fused"
      [[ ${VLLM:-yes} == no ]] || engines+=",vllm:serve_arm=default:$own,vllm:serve_arm=inproc_async:$own"
      [[ ${UPSTREAM:-yes} == no ]] || engines="nano_vllm:$own,$engines"
      engines="engines=[$engines]"
      run "$python" -m harness.compare "$engines" baseline=nano workload=full rounds="${ROUNDS:-6}" \
        launches="${LAUNCHES:-1}" into="$results/compare" limits.gpu_memory_utilization="${SHARE:-0.18}" \
        limits.kv_cache_tokens="${CACHE_TOKENS:-214016}" "${common[@]}"
      ;;
    models)
      # Each looks at what is free, one after the other; what is left holds the reference in float32.
      for model in ${MODELS:-qwen3-4b}; do
        run "$python" -m harness.compare 'engines=[nano,fused]' baseline=nano workload=tpot model="$model" \
          'workload.prefill=[[1,128],[1,1024]]' 'workload.decode=[[1,128],[8,128],[32,128]]' rounds="${ROUNDS:-3}" \
          launches="${LAUNCHES:-1}" into="$results/compare-models-$model" limits.gpu_memory_utilization=0.4 \
          "${common[@]}"
      done
      ;;
    ablation) ablate fused - ablation-without ;;
    alone) ablate 'fused:features=[]' '' ablation-alone ;;
    ops)
      run "$python" -m harness.ops op=rms_norm_linear model="${OPS_MODEL:-qwen3-0.6b}" results="$results" \
        max_iterations=100 max_seconds_per_shape=1.0
      ;;
    shapes)
      run "$python" -m harness.ops op=rms_norm_linear model=all "rows=[1,8,64,512,4096,16384]" results="$results" \
        max_iterations=50 max_seconds_per_shape=0.5
      ;;
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
      echo "There is no part $1; run bare, this script tells which there are." >&2
      exit 2
      ;;
  esac
}

if (($# == 0)); then
  sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"
  exit 0
fi
[[ $* == all ]] && set -- compare models ablation alone ops shapes latency throughput grid trial
for name in "$@"; do part "$name"; done
exit "$failed"
