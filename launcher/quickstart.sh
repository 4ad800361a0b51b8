#!/usr/bin/env bash
# From a fresh clone to a distilled student: .venv, install, the quickstart pipeline into runs/quickstart, where to look.
#
#   bash launcher/quickstart.sh [key=value ...]        any key of configs/quickstart.yaml, e.g. evaluate.sts=DIR
#
# See launcher/install.sh for PYTHON and DISTILL_PIP_ARGS.
set -euo pipefail
case " $* " in *" -h "* | *" --help "*) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit ;; esac
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
source launcher/install.sh
install "$root" quickstart
started=$SECONDS
.venv/bin/python launcher/quickstart_text.py
.venv/bin/python launcher/pipeline.py --config configs/quickstart.yaml "$@"
cat <<EOF
$((SECONDS - started)) s. What to do now:
  .venv/bin/tensorboard --logdir runs/                                                     watch it
  .venv/bin/python launcher/search.py --run runs/quickstart "how do I gather a tensor from all ranks"
  SentenceTransformer("runs/quickstart/export/hpd", truncate_dim=64)                       use it
EOF
