#!/usr/bin/env bash
# The whole thing from one command: set up, then SFT, reward models, PPO and evaluation.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/quickstart.sh [--workdir DIR] [ARGUMENT...]

  --workdir DIR  the run's folder (default: runs/quickstart); run again with the same folder to
                 go on where it stopped
  ARGUMENT       handed to rlhf_jax.pipeline, such as --config.seed=1 (with a --workdir of its own)

For a GPU or TPU run launch/setup.sh --gpu (or --tpu) once before.
TEXT
}

main() {
  local root venv workdir='' arguments=()
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  venv=${RLHF_VENV:-$root/.venv}
  [[ $venv == /* ]] || venv=$PWD/$venv
  while (($#)); do
    case $1 in
      --workdir)
        (($# > 1)) || {
          usage >&2
          exit 2
        }
        workdir=$2
        shift
        ;;
      --workdir=*) workdir=${1#--workdir=} ;;
      -h | --help)
        usage
        return
        ;;
      *) arguments+=("$1") ;;
    esac
    shift
  done
  workdir=${workdir:-$root/runs/quickstart}
  [[ $workdir == /* || $workdir == *://* ]] || workdir=$PWD/$workdir

  cd "$root"
  RLHF_VENV=$venv bash launch/setup.sh --quiet
  # Without an accelerator jax would look for one first, slowly where the TPU compiler is installed.
  if ! compgen -G '/dev/accel*' >/dev/null && ! compgen -G '/dev/vfio/[0-9]*' >/dev/null &&
    ! command -v nvidia-smi >/dev/null; then
    export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
  fi
  exec "$venv/bin/python" -m rlhf_jax.pipeline --config=configs/quickstart.py \
    --workdir="$workdir" ${arguments[@]+"${arguments[@]}"}
}

main "$@"
