#!/usr/bin/env bash
# The test suite, from a fresh clone: .venv, install, pytest. Further arguments go to pytest; --full adds the long soaks.
#
#   bash tests/run.sh
#   bash tests/run.sh --full tests/training -k resume
#   bash tests/run.sh --readme [FOLDER]       instead: every block of README.md, in a fresh clone (half an hour)
#
#   DISTILL_DATA      a folder with sts/, retrieval/, unlabelled/ ...: tests that need it skip without it, and say so
#   DISTILL_MODELS    a folder with minilm-l6/, mpnet-base/ ...: likewise
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
if [ "${1:-}" = --readme ]; then
  exec "${PYTHON:-python3}" tests/readme.py "${@:2}"
fi
source launcher/install.sh
install "$root" quickstart,dev,onnx,retrieval,study
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
exec .venv/bin/python -m pytest --durations=15 -rs "$@"
