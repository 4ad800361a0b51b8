# shellcheck shell=bash
# What a job needs before anything of it runs; sourced by slurm/*.sh at the clone's root: the site's modules, a Python.
#
# slurm/site.sh, if there is one, is read first (see slurm/site.example.sh). Leaves `python`, an array: "${python[@]}" SCRIPT, and
# the function choose_config.

if [ -f slurm/site.sh ]; then source slurm/site.sh; fi
if [ -n "${DISTILL_MODULES:-}" ]; then
  # shellcheck disable=SC2086  # names are meant to be split
  module load $DISTILL_MODULES
fi
if [ -n "${DISTILL_CONTAINER:-}" ]; then
  # shellcheck disable=SC2206  # options are meant to be split
  python=(apptainer exec ${DISTILL_CONTAINER_OPTIONS:-} --bind "$PWD" --env "PYTHONPATH=$PWD" "$DISTILL_CONTAINER" python)
  export DISTILL_PYTHON="${python[*]@Q}" # in the container, srun starts the container on the other nodes
elif [ -x .venv/bin/python ]; then
  python=(.venv/bin/python)
else
  echo "error: no $PWD/.venv: run \`bash launcher/install.sh\` once on this machine, or submit from the clone" >&2
  exit 2
fi

# Sets `config` to the first argument and `overrides` to the others; without a config, to the quickstart's, whose text it writes.
choose_config() {
  if [ $# -gt 0 ] && [[ $1 != *=* ]]; then
    config=$1
    shift
  else
    config=configs/quickstart.yaml
    "${python[@]}" launcher/quickstart_text.py
  fi
  overrides=("$@")
}
