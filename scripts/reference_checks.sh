#!/usr/bin/env bash
# Checks fused on this machine's GPU and studies it, each part within a time limit:
#
#   scripts/reference_checks.sh PART...
#
#   startup      how long a start takes with empty caches of compiled kernels, and with what that left    200 s
#   paces        calls of nano and fused alone on the GPU and beside another process's context            150 s each
#   ablation     fused without each of its features, taking turns with all of them                        180 s
#   validate     decode logits at every captured batch size and where contexts cross borders              150 s
#   soak         10,000 random requests through a cache too small for them                                150 s
#   memcheck     compute-sanitizer over the kernels                                                       180 s
#   checks       these three at once: none of them is timed; what they say goes to $RESULTS/PART.log
#   ops          RMSNorm and the linear layer after it, fused and not, from 1 to 16,384 rows              150 s
#   shapes       the same at fewer numbers of rows, for the shapes of all models                          300 s
#   serving      requests that arrive at several rates, nano and fused                                    300 s
#   energy       J per token of a few steps, nano and fused                                               150 s
#   alone        fused with each of its features alone, taking turns with none                            400 s
#   vllm         serving and energy of vLLM                                                               150 s each
#   all          startup paces ablation checks ops shapes serving energy
#
# A part that fails or runs out of time does not stop the next one; a table of all stands at the end. startup keeps its
# compiled kernels in $CACHES ($RESULTS/caches), and the other parts go on with them. Results go to $RESULTS
# (results/reference-runs), from where `python scripts/reference_refresh.py` takes them. From the environment:
#
#   LIMIT_PART=SECONDS   another limit, as LIMIT_SOAK=60; soak and validate end by themselves before it
#   RATES=[20,32,44,64]  requests a second in serving
#   CHECKED=bfloat16     names of tests in memcheck (all: every one)
#   MODEL=qwen3-0.6b     the model of all parts but soak, memcheck and shapes
#   PYTHON=.venv/bin/python  DRY_RUN=1 (only prints the commands)
#
# A part's results are measured once: for another time name another $RESULTS. validate goes on with the cases that it had
# no time for, if the code is still the same. Exit code: 0, or 1 where a part failed.
set -uo pipefail
cd "$(dirname "$0")/.."

export PYTHON=${PYTHON:-.venv/bin/python} RESULTS=${RESULTS:-results/reference-runs} MODEL=${MODEL:-qwen3-0.6b}
caches=$(realpath -m "${CACHES:-$RESULTS/caches}")
summary=$(mktemp)
trap 'rm -f "$summary"' EXIT

limit() { # PART DEFAULT
  local name=LIMIT_${1^^}
  echo "${!name:-$2}"
}

# NAME SECONDS COMMAND...; an interrupt lets Python keep what it has measured. `timeout` leads a process group of its own,
# to which nobody else's Ctrl-C comes: it is passed on, and ends the script too.
within() {
  local name=$1 seconds=$2 started=$SECONDS code=0 outcome=ok
  shift 2
  printf '+ timeout -s INT -k 5 %s' "$seconds"
  printf ' %q' "$@"
  echo
  [[ -z ${DRY_RUN:-} ]] || return 0
  timeout -s INT -k 5 "$seconds" "$@" &
  running=$!
  trap 'kill -INT "$running" 2> /dev/null; wait "$running"; exit 130' INT TERM HUP
  wait "$running" || code=$?
  trap - INT TERM HUP
  case $code in
    0) ;;
    124 | 137) outcome="stopped after $seconds s" ;;
    *) outcome="failed, exit code $code" ;;
  esac
  printf '%-12s %5d s  %s\n' "$name" $((SECONDS - started)) "$outcome" >> "$summary"
}

harness() { # NAME SECONDS OVERRIDES...
  local name=$1 seconds=$2
  shift 2
  within "$name" "$seconds" "$PYTHON" -m harness -m model="$MODEL" results="$RESULTS" weights="${WEIGHTS:-random}" \
    hydra.sweep.dir="$RESULTS/$name" "$@"
}

serve=(workload=serving workload.rates="${RATES:-[20,32,44,64]}")
spend=(workload=energy instrument=steps instrument.energy=true instrument.energy_seconds=2
  instrument.max_seconds_per_shape=1)

part() {
  local seconds kept=()
  case $1 in
    startup)
      [[ -e $caches ]] || kept=(--caches "$caches")
      within startup "$(limit startup 200)" "$PYTHON" scripts/startup.py "${kept[@]}" \
        --json "$RESULTS/startup.json" -- model="$MODEL"
      ;;
    paces)
      for engine in nano fused; do
        within "paces-$engine" "$(limit paces 150)" "$PYTHON" scripts/paces.py --engine "$engine" \
          --json "$RESULTS/paces-$engine.json" -- model="$MODEL"
      done
      ;;
    checks)
      for name in validate soak memcheck; do
        if [[ -n ${DRY_RUN:-} ]]; then part "$name"; else part "$name" > "$RESULTS/$name.log" 2>&1 & fi
      done
      trap 'kill $(jobs -p) 2> /dev/null; wait; exit 130' INT TERM HUP
      wait
      trap - INT TERM HUP
      [[ -n ${DRY_RUN:-} ]] || tail -n 6 "$RESULTS"/{validate,soak,memcheck}.log
      ;;
    ablation | alone)
      seconds=$([[ $1 == alone ]] && echo 400 || echo 180)
      within "$1" "$(limit "$1" "$seconds")" scripts/reference_runs.sh "$1"
      ;;
    ops) within ops "$(limit ops 150)" env OPS_MODEL="$MODEL" scripts/reference_runs.sh ops ;;
    shapes) within shapes "$(limit shapes 300)" scripts/reference_runs.sh shapes ;;
    validate)
      seconds=$(limit validate 150)
      within validate "$seconds" "$PYTHON" scripts/validate.py --engines fused --models "$MODEL,tiny-bf16,tiny" \
        --seconds $((seconds - 20)) --resume --json "$RESULTS/validation.json"
      ;;
    soak)
      # nano takes about as long again for the same requests, and both have to start.
      seconds=$(limit soak 150)
      within soak "$seconds" "$PYTHON" scripts/soak.py --seconds $((seconds / 3)) --json "$RESULTS/soak.json"
      ;;
    serving) harness serving "$(limit serving 300)" engine=nano,fused "${serve[@]}" ;;
    energy) harness energy "$(limit energy 150)" engine=fused,nano "${spend[@]}" ;;
    memcheck)
      within memcheck "$(limit memcheck 180)" env JSON="$RESULTS/memcheck.json" scripts/memcheck.sh \
        "${CHECKED:-bfloat16}"
      ;;
    vllm)
      harness serving-vllm "$(limit vllm 150)" engine=vllm "${serve[@]}"
      harness energy-vllm "$(limit vllm 150)" engine=vllm "${spend[@]}"
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
[[ $* == all ]] && set -- startup paces ablation checks ops shapes serving energy
[[ -n ${DRY_RUN:-} ]] || mkdir -p "$RESULTS"
export TRITON_CACHE_DIR=$caches/triton_cache_dir TORCHINDUCTOR_CACHE_DIR=$caches/torchinductor_cache_dir
for name in "$@"; do part "$name"; done
[[ -n ${DRY_RUN:-} ]] || { echo; cat "$summary"; }
! grep -qv ' ok$' "$summary"
