#!/usr/bin/env bash
# Creates a TPU VM or pod slice and installs the project on all its workers. Safe to run again:
# a VM that is there is not created again, and nothing is installed twice.
# shellcheck disable=SC2034,SC2154 # common.sh sets and reads name, place, dry_run, ...
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/tpu_vm_create.sh --name NAME --zone ZONE --type TYPE [OPTION...]

  --name NAME        of the VM, and of the queued resource with --queued
  --zone ZONE        such as us-west4-a
  --type TYPE        the accelerator type, such as v5litepod-16, v4-32, v5p-32, v6e-16
  --version VERSION  the runtime (default: Google's common one for v4, v5e, v5p and v6e)
  --project PROJECT  default: gcloud's own setting
  --spot             a spot VM: cheaper, may be preempted
  --queued           asks for a queued resource and waits until it is granted
  --recreate         a VM that was preempted (or a request that failed) is deleted and asked for
                     again; one that is alive is never deleted
  --before COMMAND   runs on every worker before the installation, each time: mount a folder, say
  --poll SECONDS     between two looks at the state (default: 30)
  --dry-run          prints the commands for a VM that does not exist yet, and runs nothing

Needs gcloud, git and tar on this machine; see docs/running_on_tpu.md.
TEXT
}

default_version() {
  case $1 in
    v4-*) echo tpu-ubuntu2204-base ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
  esac
}

# Prints the state of a node or queued resource; ABSENT if there is none of that name.
describe() {
  local answer
  if answer=$(gcloud compute tpus "$1" describe "$name" "${place[@]}" --format="$2" 2>&1); then
    printf '%s\n' "${answer##*$'\n'}"
  elif [[ $answer == *NOT_FOUND* ]]; then
    echo ABSENT
  else
    fail "gcloud could not describe $name: $answer"
  fi
}

# A granted request says nothing about the node, which may have been preempted since.
state() {
  local found=ACTIVE
  if ((queued)); then
    found=$(describe queued-resources 'value(state.state)') || return
  fi
  if [[ $found == ACTIVE || $found == ABSENT ]]; then
    found=$(describe tpu-vm 'value(state)') || return
  fi
  printf '%s\n' "$found"
}

create() {
  local spot_flag=()
  if ((spot)); then spot_flag=(--spot); fi
  if ((queued)); then
    run gcloud compute tpus queued-resources create "$name" --node-id="$name" "${place[@]}" \
      --accelerator-type="$type" --runtime-version="$version" ${spot_flag[@]+"${spot_flag[@]}"}
  else
    run gcloud compute tpus tpu-vm create "$name" "${place[@]}" --accelerator-type="$type" \
      --version="$version" ${spot_flag[@]+"${spot_flag[@]}"}
  fi
}

delete() {
  if ((queued)); then
    # --force takes the node along.
    gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
  else
    gcloud compute tpus tpu-vm delete "$name" "${place[@]}" --quiet
  fi
}

ensure_vm() {
  local found created=0
  while true; do
    found=$(state)
    case $found in
      READY)
        ((created)) || echo "$name exists and is ready; it is not created again"
        return
        ;;
      ABSENT)
        if ! ((created)); then
          create
          created=1
          continue
        fi
        ;;
      PREEMPTED | TERMINATED | FAILED | SUSPENDING | SUSPENDED)
        ((recreate)) || fail "$name is $found; --recreate deletes it and asks for a new one"
        echo "$name is $found: deleting it"
        delete
        created=0
        continue
        ;;
      STOPPED | STOPPING | HIDDEN | HIDING)
        fail "$name is $found; start it first: gcloud compute tpus tpu-vm start $name $(
          quote "${place[@]}"
        )"
        ;;
    esac
    echo "$name is $found; waiting"
    sleep "$poll"
  done
}

main() {
  # shellcheck source=/dev/null
  source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
  type='' version='' before='' spot=0 queued=0 recreate=0 poll=30
  while (($#)); do
    case $1 in
      --*=*)
        set -- "${1%%=*}" "${1#*=}" "${@:2}"
        continue
        ;;
      --name | --zone | --project | --type | --version | --before | --poll)
        need_value "$@"
        printf -v "${1#--}" '%s' "$2"
        shift
        ;;
      --spot) spot=1 ;;
      --queued) queued=1 ;;
      --recreate) recreate=1 ;;
      --dry-run) dry_run=1 ;;
      -h | --help)
        usage
        return
        ;;
      *) refuse "unknown argument '$1'; --help lists the options" ;;
    esac
    shift
  done
  [[ -n $type ]] || refuse '--type is missing'
  [[ $type =~ ^[a-z0-9]+-[0-9]+$ ]] || refuse "--type '$type' is not like v5litepod-16"
  version=${version:-$(default_version "$type")}
  [[ -n $version ]] || refuse "--version is missing: no default is known for $type"
  need_count --poll "$poll"
  check_place

  if ((dry_run)); then
    ! ((queued)) || run gcloud compute tpus queued-resources describe "$name" "${place[@]}" \
      --format='value(state.state)'
    run gcloud compute tpus tpu-vm describe "$name" "${place[@]}" --format='value(state)'
    create
  else
    ensure_vm
  fi
  [[ -z $before ]] || on_all_workers "$before"
  ship ''
  worker_command install
}

main "$@"
