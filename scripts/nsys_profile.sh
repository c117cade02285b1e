#!/usr/bin/env bash
set -euo pipefail
usage() {
  cat <<'TEXT'
Profiles the traced passes of one run with Nsight Systems, and turns what it saw into rows of our tables.

    scripts/nsys_profile.sh engine=nano model=qwen3-0.6b [any other override of python -m harness]

1. nsys profile, from cudaProfilerStart to cudaProfilerStop, which stand around the traced passes, kernels inside CUDA
   graphs one by one: python -m harness instrument=nvtx OVERRIDES
2. nsys export to SQLite
3. python -m harness.nsys FILE: a run with source nsys, for harness.report, harness.trace and harness.roofline

The profile (.nsys-rep, for the Nsight Systems GUI) and its export lie in $OUT.

From the environment:
    OUT=results/nsys    where everything goes
    NSYS=nsys           the tool; from https://developer.nvidia.com/nsight-systems, or NVIDIA's package nsight-systems-cli
    PYTHON              default: .venv/bin/python if there is one, else python3
    DRY_RUN=1           print the commands and run none

Exit codes: 0 done, 2 nsys is missing or no override was given, otherwise that of the step that failed.
TEXT
}

case "${1:-}" in "" | -h | --help) usage; exit 0 ;; esac
for override in "$@"; do
  [[ $override == *=* ]] || { echo "$override is no override like engine=nano; see scripts/nsys_profile.sh --help." >&2; exit 2; }
done
cd "$(dirname "$0")/.."

nsys=${NSYS:-nsys}
python=${PYTHON:-python3}
[[ -n ${PYTHON:-} || ! -x .venv/bin/python ]] || python=.venv/bin/python
out=${OUT:-results/nsys}
stem=$out/$(date +%Y-%m-%d-%H-%M-%S)

run() {
  printf '+'; printf ' %q' "$@"; echo
  [[ -n ${DRY_RUN:-} ]] || "$@"
}

if [[ -z ${DRY_RUN:-} ]] && ! command -v "$nsys" >/dev/null; then
  echo "Nsight Systems ($nsys) is not installed: https://developer.nvidia.com/nsight-systems, or NVIDIA's package" \
    "nsight-systems-cli. NSYS names it where it is not in PATH." >&2
  exit 2
fi

# Captured ranges are found through the graphs' nodes (harness/nsys), so any version that traces nodes will do.
run mkdir -p "$out"
run "$nsys" profile -t cuda,nvtx --sample=none --cpuctxsw=none --cuda-graph-trace=node \
  --capture-range=cudaProfilerApi --capture-range-end=stop --output "$stem" --force-overwrite=true \
  "$python" -m harness instrument=nvtx "$@"
run "$nsys" export --type sqlite --output "$stem.sqlite" --force-overwrite=true "$stem.nsys-rep"
run "$python" -m harness.nsys "$stem.sqlite"
