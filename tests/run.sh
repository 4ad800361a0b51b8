#!/usr/bin/env bash
# The test suite, from a fresh clone: .venv, install, pytest. Further arguments go to pytest.
#
#   bash tests/run.sh [tests/training -k resume]    every stage, ZeRO 0 to 3, kill and resume, export, evaluation: ten minutes
#   bash tests/run.sh --slow [...]                  instead: what CI runs too (Slurm, browsers, pairs of settings, failing ranks)
#   bash tests/run.sh --soak [...]                  instead: what takes hours (all settings, more kills)
#   bash tests/run.sh --readme [FOLDER]             instead: every block of README.md, in a fresh clone (half an hour)
#
#   DISTILL_DATA      a folder with sts/, retrieval/, unlabelled/ ...: tests that need it skip without it, and say so
#   DISTILL_MODELS    a folder with minilm-l6/, mpnet-base/ ...: likewise
#
# Tests run two at a time; then, alone, those that are marked serial: they need the whole machine or measure time.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
which="not slow and not soak"
case ${1:-} in
  --readme) exec "${PYTHON:-python3}" tests/readme.py "${@:2}" ;;
  --slow) which="slow and not soak"; shift ;;
  --soak) which=soak; shift ;;
esac
source launcher/install.sh
install "$root" quickstart,dev,onnx,retrieval
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

no_tests=5 # pytest's exit code where it finds none
code=$no_tests
run_part() {
  local part=0
  .venv/bin/python -m pytest --durations=10 -rs -m "$which and $1" "${@:2}" || part=$?
  [ $part != 2 ] || exit 2 # interrupted
  if [ $code = 0 ] || [ $code = $no_tests ]; then
    [ $part = $no_tests ] || code=$part
  fi
}
run_part "not serial" -n 2 --dist loadfile "$@"
run_part serial "$@"
exit $code
