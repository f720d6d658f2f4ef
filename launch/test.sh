#!/usr/bin/env bash
# Sets up with the test extras, then linter, formatter and the suite. Fails if any of them does.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/test.sh [--all] [ARGUMENT...]

  --all     the slow tests too, with shapes checked in all code (else in code for devices)
  ARGUMENT  handed to pytest, such as tests/ops or -k gae

  RLHF_DATA  the folder with real public data (default: ../shared/data); the tests that need it
             are skipped where it is absent, and counted at the end
TEXT
}

main() {
  local root venv
  if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    usage
    return
  fi
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  venv=${RLHF_VENV:-$root/.venv}
  [[ $venv == /* ]] || venv=$PWD/$venv
  if [[ -n ${RLHF_DATA:-} && $RLHF_DATA != /* ]]; then
    export RLHF_DATA=$PWD/$RLHF_DATA
  fi

  cd "$root"
  RLHF_VENV=$venv bash launch/setup.sh --quiet test
  # The tests call linters and programs by name.
  export PATH=$venv/bin:$PATH
  local status=0 shapes=()
  if [[ " $* " == *' --all '* ]]; then
    shapes=('--jaxtyping-packages=rlhf_jax,beartype.beartype')
  fi
  ruff check . || status=1
  ruff format --check . || status=1
  # Without the cache plug-in a read-only checkout works too; a hanging test ends with its stack.
  # One worker per core, whole files each: fixtures and compiled programs are shared in a file. The
  # order is that of tests/conftest.py.
  # A worker that dies ends the run with the name of its test; a new one would wait for ever.
  python -m pytest -q -p no:cacheprovider --timeout=900 --durations=15 -n auto --dist loadfile \
    --no-loadscope-reorder --max-worker-restart=0 "${shapes[@]}" "$@" || status=1
  if ((status)); then
    echo 'launch/test.sh: FAILED' >&2
  fi
  return "$status"
}

main "$@"
