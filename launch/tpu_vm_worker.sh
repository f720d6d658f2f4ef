#!/usr/bin/env bash
# The part that runs on every worker; tpu_vm_create.sh and tpu_vm_run.sh ship and call it.
#
# Everything lies in ~/rlhf_jax: code/ venv/ logs/, what was shipped, and the state of the run:
#   lock  held by a run from its start to its end, so nothing stale can look like a run
#   id pid said  the run's name, its process group and how it stands, in words
# The workers of one run speak through WORKDIR/.launch/ID, which all of them see.
set -euo pipefail

house=$HOME/rlhf_jax

fail() {
  printf '%s: %s\n' "$HOSTNAME" "$*" >&2
  exit 1
}

running() {
  ! flock -n "$house/lock" true
}

# Takes the lock until this process and its children have ended.
take_lock() {
  exec 9>"$house/lock"
  flock -w 2 9 || fail "a run (or an installation) is going on; look with --status, end it with" \
    "--stop, or start with --restart"
}

say() {
  printf '%s\n' "$*" >"$house/said"
  printf '== %s %s\n' "$(date '+%F %T')" "$*"
}

# How many files of the run match; making one first, because a network file system may keep an
# old list of the folder until this machine changes it.
seen() {
  local probe
  probe=$(mktemp "$marks/probe-XXXXXX") && rm -f "$probe"
  find "$marks" -name "$1" | wc -l
}

# Our lower bound is Python 3.11; where the image is older, uv brings a newer one.
find_python() {
  bash launch/setup.sh --which 2>/dev/null && return
  echo "$HOSTNAME: no Python from 3.11 on; fetching one with uv" >&2
  PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv >&2
  python3 -m uv python install --quiet 3.12 >&2
  python3 -m uv python find --managed-python 3.12
}

install() {
  local python
  take_lock
  rm -f "$house/pid"
  rm -rf "$house/code.new"
  mkdir "$house/code.new"
  tar -xf "$house/shipped/code.tar" -C "$house/code.new"
  rm -rf "$house/code"
  mv "$house/code.new" "$house/code"
  cd "$house/code"
  export RLHF_VENV=$house/venv
  if [[ -x $RLHF_VENV/bin/python ]]; then
    bash launch/setup.sh --tpu --quiet >&2
  else
    python=$(find_python) || fail 'found no Python from 3.11 on, and could not fetch one'
    PYTHON=$python bash launch/setup.sh --tpu >&2
  fi
  # tpu_vm_run.sh counts these lines.
  echo "rlhf_jax: $HOSTNAME is ready"
}

# start ID WORKERS RETRIES PAUSE PROGRAM WORKDIR ARGUMENT...
start() {
  local id=$1 workers=$2 workdir=$6 here=0
  # gcloud runs a command again when the connection broke in the middle.
  if running && [[ $(cat "$house/id" 2>/dev/null) == "$id" ]]; then
    echo "$HOSTNAME: started before"
    return
  fi
  take_lock
  rm -f "$house/pid"
  echo "$id" >"$house/id"
  marks=$workdir/.launch/$id
  mkdir -p "$marks" || fail "cannot write to the workdir $workdir"
  touch "$marks/ready-$HOSTNAME"
  SECONDS=0
  until here=$(seen 'ready-*') && ((here >= workers)); do
    ((SECONDS < 60)) || fail "$here of $workers workers see each other in $workdir: it must be one" \
      "folder that all workers share (a mounted NFS share or bucket)"
    sleep 1
  done
  mkdir -p "$house/logs"
  # A session of its own: it outlives the ssh connection and can be stopped as one group.
  setsid bash "$house/code/launch/tpu_vm_worker.sh" supervise "$@" \
    </dev/null >>"$house/logs/$id.log" 2>&1 &
  echo "$!" >"$house/pid"
  echo "$HOSTNAME: started"
}

# Ends the program of this worker when another worker of the run failed: a collective would wait
# for the lost one for ever.
watch_others() {
  local child=$1 number=$2
  until (($(seen "failed-$number-*") + $(seen 'bad-input-*'))); do
    sleep 1
  done
  echo '== another worker failed: ending this one'
  kill -TERM "$child" || true
  # jax takes SIGTERM as notice of a preemption and goes on.
  sleep 10
  kill -KILL "$child" || true
}

run_once() {
  local number=$1 child watcher status=0
  shift
  "$house/venv/bin/python" -m "$@" &
  child=$!
  watch_others "$child" "$number" 9>&- &
  watcher=$!
  wait "$child" || status=$?
  kill "$watcher" 2>/dev/null || true
  return "$status"
}

# The same arguments as start. Failed workers are started again together, RETRIES times at most.
supervise() {
  local id=$1 retries=$3 pause=$4 program=$5 workdir=$6 number status
  shift 6
  marks=$workdir/.launch/$id
  cd "$house/code"
  # Without a TPU jax would quietly take the CPU.
  export JAX_PLATFORMS=${JAX_PLATFORMS:-tpu,cpu}
  for ((number = 1; number <= retries + 1; number++)); do
    say "running, start $number of $((retries + 1))"
    status=0
    run_once "$number" "rlhf_jax.$program" --distributed --workdir="$workdir" "$@" || status=$?
    case $status in
      0)
        say 'finished'
        return
        ;;
      2)
        touch "$marks/bad-input-$HOSTNAME"
        say 'stopped: bad input (status 2), see the log; it is not started again'
        return
        ;;
    esac
    echo "== ended with status $status"
    touch "$marks/failed-$number-$HOSTNAME"
    sleep "$pause"
    if (($(seen 'bad-input-*'))); then
      say 'stopped: another worker found bad input; see its log'
      return
    fi
  done
  say "failed with status $status after $((retries + 1)) starts"
}

# Waits at most $1 seconds for the run to end.
ended_within() {
  SECONDS=0
  while running; do
    ((SECONDS < $1)) || return 1
    sleep 0.2
  done
}

# stop [ID]: ends the run, or only the one with this name.
stop() {
  local group
  if ! running; then
    echo "$HOSTNAME: nothing is running"
    return
  fi
  if [[ $# -gt 0 && $(cat "$house/id" 2>/dev/null) != "$1" ]]; then
    return
  fi
  group=$(cat "$house/pid" 2>/dev/null) || fail 'it is still starting or installing; try again'
  kill -TERM -- "-$group" || true
  if ! ended_within 10; then
    kill -KILL -- "-$group" || true
    ended_within 10 || fail "process group $group does not end"
  fi
  echo stopped >"$house/said"
  echo "$HOSTNAME: stopped"
}

status() {
  local said='never started'
  [[ ! -f $house/said ]] || said=$(cat "$house/said")
  if [[ $said == running* ]] && ! running; then
    said="ended without a word (a reboot?), last: $said"
  fi
  printf '%s: %s\n' "$HOSTNAME" "$said"
}

logs() {
  status
  [[ -f $house/id ]] || return 0
  tail -n "$1" "$house/logs/$(cat "$house/id").log" 2>/dev/null | sed "s/^/$HOSTNAME| /"
}

main() {
  mkdir -p "$house"
  case ${1:-} in
    install | start | supervise | stop | status | logs) "$@" ;;
    *) fail 'this script is called by tpu_vm_create.sh and tpu_vm_run.sh' ;;
  esac
}

main "$@"
