#!/usr/bin/env bash
# The whole pipeline in one job, which is requeued after preemptions, time limits and lost nodes until it is done.
#
#   sbatch slurm/distill.sh [CONFIG] [key=value ...]
#   sbatch --nodes 2 --gpus-per-node 8 --cpus-per-task 64 slurm/distill.sh configs/mine.yaml ckd.lr=1e-4
#   sbatch --nodes 1-4 ...                              requeued on fewer nodes if necessary: the same global batches
#
# A node has a rank for each of its GPUs (or engine.num_ranks), and --cpus-per-task are the cores that they share. Without a
# CONFIG it runs configs/quickstart.yaml. The defaults below suit one node without GPUs; options on sbatch's command line override
# them, and so do the variables of slurm/site.sh (see slurm/site.example.sh). The warning comes 120 s before the end: set more
# for a student whose checkpoint takes longer, --signal=B:USR1@SECONDS.
#SBATCH --job-name=distill
#SBATCH --nodes=1
#SBATCH --cpus-per-task=2
#SBATCH --output=distill-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
set -euo pipefail
trap '' USR1 TERM # until Python handles them: the warning must not end the job, which would not be requeued
cd "${DISTILL_ROOT:-${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}}"
source launcher/environment.sh
choose_config "$@"
exec "${python[@]}" launcher/pipeline.py --config "$config" --srun "${overrides[@]}" # exec: so that it gets the warning
