#!/usr/bin/env bash
# All that fits into nine minutes on one GPU: the benchmarks, ppo_tiny, the tests; as a table.
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: benchmarks/gpu.sh [--small] [--python PROGRAM] [--out FILE] [--seconds N]

  --small           shrunken shapes and a sample of the tests; runs on a CPU too
  --python PROGRAM  use this Python as it is instead of setting up an environment (containers)
  --out FILE        the table (default: docs/results/gpu.md; with --small runs/gpu_small.md)
  --seconds N       stop after N seconds in all (default: 530); what has not run is named

Exit status 1 if any part failed or ran out of time; the table says which.
TEXT
}

# Runs one part under its own limit and what is left in all, and notes how it ended.
run_part() {
  local name=$1 limit=$2 began left status=0 result
  shift 2
  left=$((deadline - SECONDS))
  limit=$((limit < left ? limit : left))
  began=$SECONDS
  if ((limit <= 0)); then
    limit=0
    result='not started: out of time'
  else
    echo "== $name (at most $limit s)"
    timeout --kill-after=5 "$limit" "$@" >"$parts/$name.out" 2>"$parts/$name.err" || status=$?
    case $status in
      0) result=ok ;;
      124 | 137) result="out of time after $limit s" ;;
      *) result="failed with status $status" ;;
    esac
  fi
  printf '%s\t%s\t%s\n' "$name" "$result" "$((SECONDS - began))" >>"$parts/parts.tsv"
  tail -n 3 "$parts/$name.out" 2>/dev/null || true
  if [[ $result != ok ]]; then
    failed=1
    echo "== $name: $result" >&2
    tail -n 20 "$parts/$name.err" >&2 2>/dev/null || true
    return 1
  fi
}

run_benchmarks() {
  local name
  for name in ceilings decode update; do
    run_part "$name" 120 "$python" -m "benchmarks.$name" "${small[@]}" || true
  done
  run_part ppo_tiny 120 "$python" -m rlhf_jax.train_policy --config=configs/ppo_tiny.py \
    --workdir="$parts/ppo_tiny" || true
  local suite=()
  ((${#small[@]} == 0)) || suite=(tests/pytree_test.py tests/ops)
  run_part tests "$((deadline - SECONDS))" "$python" -m pytest -q -p no:cacheprovider \
    "${suite[@]}" || true
}

main() {
  local python='' out='' limit=530 invoked_from=$PWD setup_extra=--gpu
  # Read by the functions above.
  small=() failed=0
  while (($#)); do
    case $1 in
      --small) small=(--small) ;;
      --python | --out | --seconds)
        (($# > 1)) || {
          usage >&2
          exit 2
        }
        case $1 in
          --python) python=$(type -P "$2") || {
            echo "benchmarks/gpu.sh: no program $2" >&2
            exit 2
          } ;;
          --out) out=$2 ;;
          --seconds) limit=$2 ;;
        esac
        shift
        ;;
      -h | --help)
        usage
        return
        ;;
      *)
        usage >&2
        exit 2
        ;;
    esac
    shift
  done
  deadline=$((SECONDS + limit))
  cd "$(dirname "${BASH_SOURCE[0]}")/.."
  if ((${#small[@]})); then
    out=${out:-$PWD/runs/gpu_small.md}
    setup_extra=''
    export JAX_PLATFORMS=cpu
  else
    out=${out:-$PWD/docs/results/gpu.md}
    export JAX_PLATFORMS=cuda,cpu # no quiet fall back to the CPU
  fi
  [[ $out == /* ]] || out=$invoked_from/$out
  [[ $python != ./* && $python != ../* ]] || python=$invoked_from/$python
  mkdir -p "$(dirname "$out")"
  parts=$(mktemp -d)
  trap 'rm -rf "$parts"' EXIT

  local writer
  if [[ -n $python ]]; then
    writer=$python
    run_benchmarks
  else
    local venv=${RLHF_VENV:-$PWD/.venv}
    [[ $venv == /* ]] || venv=$invoked_from/$venv
    python=$venv/bin/python
    writer=python3
    # shellcheck disable=SC2086 # empty on purpose where there is no extra
    if RLHF_VENV=$venv run_part setup 240 bash launch/setup.sh $setup_extra test; then
      writer=$python
      export PATH=$venv/bin:$PATH
      run_benchmarks
    fi
  fi
  "$writer" benchmarks/table.py "$parts" >"$out.new"
  mv "$out.new" "$out"
  echo "== wrote $out"
  return "$failed"
}

main "$@"
