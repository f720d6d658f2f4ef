#!/usr/bin/env bash
# Makes the virtual environment and installs rlhf_jax into it. Safe to run again: nothing is
# installed twice unless setup.py changed or something more is asked for.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/setup.sh [--gpu | --tpu] [EXTRA...]

  EXTRA     an extra of setup.py: test, notebooks, hf-parity
  --gpu     JAX with CUDA (the extra gpu)
  --tpu     JAX with libtpu (the extra tpu)
  --which   only print the Python that would make the environment
  --quiet   print nothing when there is nothing to do

  RLHF_VENV  where the environment goes (default: .venv in the repository)
  PYTHON     which Python makes it (default: the newest from 3.11 on that runs and has venv)
TEXT
}

fail() {
  printf 'launch/setup.sh: %s\n' "$*" >&2
  exit 1
}

# Whether $1 runs, is 3.11 or newer and can make environments. A pyenv shim may exist and yet
# fail, and Debian's python3 comes without ensurepip, so only running it tells.
can_make_venv() {
  "$1" -c 'import sys; assert sys.version_info >= (3, 11); import ensurepip, venv' \
    >/dev/null 2>&1
}

minor_version() {
  "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

find_python() {
  if [[ -n ${PYTHON:-} ]]; then
    can_make_venv "$PYTHON" || fail "PYTHON=$PYTHON does not run, is older than 3.11, or has no" \
      "ensurepip (Debian and Ubuntu: apt-get install python3-venv)"
    printf '%s\n' "$PYTHON"
    return
  fi
  local minor candidate
  for minor in 3.{20..11} 3; do
    # All of that name on PATH: the first may be a shim that fails.
    while IFS= read -r candidate; do
      if can_make_venv "$candidate"; then
        printf '%s\n' "$candidate"
        return
      fi
    done < <(type -aP "python$minor" || true)
  done
  fail "no Python from 3.11 on with venv and ensurepip found on PATH. Install one (Debian and" \
    "Ubuntu: apt-get install python3 python3-venv), or set PYTHON to one"
}

make_venv() {
  local venv=$1 python
  if [[ -d $venv && ! -f $venv/pyvenv.cfg && -n $(ls -A "$venv") ]]; then
    fail "$venv is not empty and is no virtual environment; set RLHF_VENV to another folder"
  fi
  if "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    local have want
    have=$(minor_version "$venv/bin/python")
    [[ $have =~ ^3\.(1[1-9]|[2-9][0-9])$ ]] || fail "$venv has Python $have; 3.11 or newer is" \
      "needed: remove it, or set RLHF_VENV to another folder"
    want=$([[ -z ${PYTHON:-} ]] || minor_version "$PYTHON")
    [[ -z ${PYTHON:-} || $have == "$want" ]] || fail "$venv has Python $have, PYTHON=$PYTHON is" \
      "'$want': remove it, or set RLHF_VENV to another folder"
    return
  fi
  python=$(find_python)
  echo "making $venv with $python"
  # Only an environment that was left half made is cleared.
  "$python" -m venv --clear "$venv" || fail "$python could not make an environment in $venv"
}

main() {
  local extras=() which=0 quiet=0
  while (($#)); do
    case $1 in
      --gpu | --tpu) extras+=("${1#--}") ;;
      --which) which=1 ;;
      --quiet) quiet=1 ;;
      -h | --help)
        usage
        return
        ;;
      -*)
        printf 'launch/setup.sh: unknown option %s; --help lists what there is\n' "$1" >&2
        exit 2
        ;;
      *) extras+=("$1") ;;
    esac
    shift
  done
  if ((which)); then
    find_python
    return
  fi

  local venv=${RLHF_VENV:-.venv}
  [[ $venv == /* || -z ${RLHF_VENV:-} ]] || venv=$PWD/$venv
  cd "$(dirname "${BASH_SOURCE[0]}")/.."
  make_venv "$venv"

  # The stamp: what was installed. Extras only ever grow, so test.sh and quickstart.sh can take
  # turns, and a GPU environment stays one.
  local stamp=$venv/rlhf_jax_setup hash old_hash='' old_extras='' wanted spec='' extra
  hash=$("$venv/bin/python" -c \
    'import hashlib; print(hashlib.sha256(open("setup.py", "rb").read()).hexdigest())')
  if [[ -f $stamp ]]; then
    { IFS= read -r old_hash && IFS= read -r old_extras; } <"$stamp" || true
  fi
  wanted=$(printf '%s\n' ${extras[@]+"${extras[@]}"} "$old_extras" | tr , '\n' | sed '/^$/d' \
    | sort -u | paste -sd , -)
  if [[ $hash == "$old_hash" && $wanted == "$old_extras" ]]; then
    ((quiet)) || echo "$venv is up to date (extras: ${wanted:-none})"
    return
  fi
  for extra in ${wanted//,/ }; do
    grep -q "\"$extra\": \[" setup.py || fail "setup.py has no extra '$extra'"
  done
  [[ -z $wanted ]] || spec="[$wanted]"
  echo "installing rlhf_jax$spec into $venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e ".$spec" \
    || fail "pip could not install .$spec into $venv (its message is above)"
  printf '%s\n%s\n' "$hash" "$wanted" >"$stamp.new"
  mv "$stamp.new" "$stamp"
}

main "$@"
