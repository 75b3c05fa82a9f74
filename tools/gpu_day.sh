#!/usr/bin/env bash
# Measures what needs a GPU, in at most 12 minutes: the tests marked cuda, then the speed of latent
# steps, decode steps and prefills at the shapes of Qwen3-0.6B, 4B and 8B, in every format.
#
#   tools/gpu_day.sh [--out FILE.json]    on a machine with a CUDA GPU; PYTHON is the interpreter
#   tools/gpu_day.sh --rehearse           tiny shapes on the CPU, in seconds, to try the script
#
# Exit status: 0 all ran, 1 no GPU, a failed test or a failed measurement, 2 wrong usage.
set -euo pipefail
caller=$PWD
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
out=gpu_day.json
rehearse=
while [ $# -gt 0 ]; do
  case $1 in
    --rehearse) rehearse=--rehearse ;;
    --out)
      shift
      if [ $# -eq 0 ]; then
        echo "gpu_day: --out: found nothing, expected FILE.json" >&2
        exit 2
      fi
      case $1 in /*) out=$1 ;; *) out=$caller/$1 ;; esac
      ;;
    *) echo "gpu_day: found '$1', expected --rehearse or --out FILE.json" >&2; exit 2 ;;
  esac
  shift
done

has_gpu='import sys, torch; sys.exit(not torch.cuda.is_available())'
if [ -z "$rehearse" ] && ! "$python" -c "$has_gpu"; then
  echo "gpu_day: found no CUDA GPU, expected one (--rehearse runs on a CPU)" >&2
  exit 1
fi

status=0
if [ -n "$rehearse" ]; then
  "$python" -m pytest --collect-only -q -m cuda -p no:cacheprovider tests/fast/test_cuda.py || status=1
else
  timeout 210 "$python" -m pytest -m cuda -p no:cacheprovider || status=1
fi
timeout 500 "$python" -m tools.benchmarking.gpu_day $rehearse --seconds 420 --out "$out" || status=1
exit $status
