#!/usr/bin/env bash
# The teacher's vectors alone, by an array of independent tasks: any of them may be killed, or start late.
#
#   sbatch --array 0-63 --gpus-per-task 1 slurm/precompute.sh CONFIG [key=value ...]
#
# When all have ended, `sbatch slurm/distill.sh CONFIG` finds the shards and continues. Submit it with --dependency to have it wait:
#
#   sbatch --dependency afterany:$(sbatch --parsable --array 0-63 slurm/precompute.sh CONFIG) slurm/distill.sh CONFIG
#SBATCH --job-name=precompute
#SBATCH --array=0-7
#SBATCH --ntasks=1
#SBATCH --output=precompute-%A_%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@60
set -euo pipefail
trap '' USR1 TERM # until Python handles them, as in distill.sh
cd "${DISTILL_ROOT:-${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}}"
source launcher/environment.sh
choose_config "$@"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}} # the default would be every core of the node
exec "${python[@]}" launcher/precompute.py --config "$config" --requeue "${overrides[@]}"
