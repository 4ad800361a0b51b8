# shellcheck shell=bash
# Settings of your cluster. Copy this file to slurm/site.sh, which git ignores, and change it there, never in distill.sh.
#
# It is read twice: by you, before sbatch, for the resources to request,
#
#   source slurm/site.sh && sbatch --nodes 2 --cpus-per-task 64 slurm/distill.sh configs/mine.yaml
#
# and by every job, for the rest. Options on sbatch's command line override it; --nodes and --cpus-per-task have no variable.

export SBATCH_ACCOUNT=myproject
export SBATCH_PARTITION=gpu
export SBATCH_TIMELIMIT=12:00:00
export SBATCH_GPUS_PER_NODE=8

export DISTILL_MODULES="cuda/12.8" # `module load` these; empty: none
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0 # the fast network's interface, where the libraries' guess is wrong
# export HF_HOME=/shared/huggingface # models and datasets, on a disk that all nodes see

# A container instead of .venv: build it with `apptainer build distill.sif slurm/distill.def`. Slurm's own commands must work in
# it, so the host's are bound into it; your site's documentation says where they and their libraries are.
# export DISTILL_CONTAINER=$PWD/distill.sif
# export DISTILL_CONTAINER_OPTIONS="--nv --bind /usr/bin/srun,/usr/bin/scontrol,/usr/lib64/slurm,/etc/slurm,/run/munge"
