#!/usr/bin/env bash
# The whole pipeline inside one allocation; finished stages are skipped, so submit it again to go on.
#
#   sbatch slurm/distill.sh [CONFIG] [key=value ...]
#   sbatch --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 slurm/distill.sh configs/mine.yaml ckd.lr=1e-4
#
# One task is one rank. The defaults below suit one node without GPUs; options on sbatch's command line win over them.
#SBATCH --job-name=distill
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=2
#SBATCH --output=distill-%j.log
#SBATCH --open-mode=append
set -euo pipefail
root=${DISTILL_ROOT:-${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}}
cd "$root"
[ -x .venv/bin/python ] || { echo "error: no $root/.venv; run launcher/quickstart.sh once, or submit from the clone" >&2; exit 2; }

config=configs/quickstart.yaml
if [ $# -gt 0 ] && [[ $1 != *=* ]]; then config=$1; shift; fi

# srun gives each task its rank; the ranks meet at the first node, on a port that no other job of this cluster has
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS
exec .venv/bin/python launcher/pipeline.py --config "$config" --srun "$@"
