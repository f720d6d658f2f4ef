#!/usr/bin/env bash
# Ships the code to all workers of a TPU VM and starts a program on all of them, detached. The same
# command after a crash or a preemption resumes the run from its workdir.
# shellcheck disable=SC2034,SC2154 # common.sh sets and reads name, root, dry_run, ...
set -euo pipefail

usage() {
  cat <<'TEXT'
usage: launch/tpu_vm_run.sh --name NAME --zone ZONE --config FILE --workdir DIR [OPTION...]
       launch/tpu_vm_run.sh --name NAME --zone ZONE --status | --logs | --stop

  --name, --zone, --project  the VM, as launch/tpu_vm_create.sh got them
  --program PROGRAM  default: pipeline
  --config FILE      as for the program, such as configs/quickstart.py or FILE:argument; a file
                     outside the repository is shipped too
  --config.KEY=VALUE handed to the program
  --workdir DIR      absolute, and one folder that all workers see at this path (a mounted NFS
                     share or bucket): process 0 writes what the others read, and each writes its
                     part of a checkpoint. A VM with one worker may use its own disk
  --retries N        start again so often if a worker fails (default: 3); bad input (status 2) is
                     never tried again
  --pause SECONDS    before a worker starts again (default: 10)
  --restart          stop what runs on the VM first; without it a second start is refused

  --status           one line for every worker
  --logs             the same, and the end of every worker's log
  --lines N          how much of it (default: 20)
  --stop             ends the run on all workers; its workdir stays

  --dry-run          prints the commands and runs nothing; N stands for the number of workers

What is shipped: the working tree as git sees it, with new files that are not ignored.
TEXT
}

# Sets config_flag, what the program gets, and outside, a config that git would not ship.
place_config() {
  local file=${config%%:*} argument='' folder inside
  [[ $config != *:* ]] || argument=:${config#*:}
  [[ -f $file ]] || refuse "--config: there is no file $file"
  folder=$(cd "$(dirname "$file")" && pwd -P)
  file=$folder/$(basename "$file")
  inside=${file#"$(cd "$root" && pwd -P)"/}
  outside=$file
  config_flag=--config=shipped_configs/$(basename "$file")$argument
  if [[ $inside != "$file" ]] && ! git -C "$root" check-ignore --quiet "$inside"; then
    outside=''
    config_flag=--config=$inside$argument
  fi
}

# The programs, one in a line.
programs() {
  cd "$root/rlhf_jax" && grep -l '^    program\.run_program(' ./*.py | sed 's|^\./||; s|\.py$||'
}

check_start() {
  programs | grep -qxF -- "$program" \
    || refuse "--program '$program': the programs are $(programs | paste -sd ' ' -)"
  [[ -n $config ]] || refuse '--config is missing'
  [[ -n $workdir ]] || refuse '--workdir is missing'
  [[ $workdir != *://* ]] \
    || refuse "--workdir $workdir is no path: mount the bucket on all workers and name the folder"
  [[ $workdir == /* ]] || refuse "--workdir $workdir must be absolute: a path on the workers"
  [[ $workdir/ != */rlhf_jax/code/* ]] \
    || refuse "--workdir $workdir lies in the shipped code, which every start replaces"
  place_config
}

start() {
  local id workers=N answer
  id=$(date -u +%Y%m%d-%H%M%S)-$$
  ship "$outside"
  ! ((restart)) || worker_command stop
  if ((dry_run)); then
    worker_command install
  else
    answer=$(worker_command install) || fail 'not all workers are ready; nothing was started'
    workers=$(grep -c '^rlhf_jax: .* is ready' <<<"$answer") || fail 'no worker answered'
  fi
  if ! worker_command start "$id" "$workers" "$retries" "$pause" "$program" "$workdir" \
    "$config_flag" ${overrides[@]+"${overrides[@]}"}; then
    worker_command stop "$id" || true
    fail 'not all workers started; those that had were stopped'
  fi
  ((dry_run)) || echo "started $program on $workers workers; look with --logs"
}

main() {
  # shellcheck source=/dev/null
  source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
  program=pipeline config='' workdir='' restart=0 retries=3 pause=10 lines=20 overrides=()
  local action=start
  while (($#)); do
    case $1 in
      --config.*) overrides+=("$1") ;;
      --*=*)
        set -- "${1%%=*}" "${1#*=}" "${@:2}"
        continue
        ;;
      --name | --zone | --project | --program | --config | --workdir | --retries | --pause | --lines)
        need_value "$@"
        printf -v "${1#--}" '%s' "$2"
        shift
        ;;
      --restart) restart=1 ;;
      --status | --logs | --stop)
        [[ $action == start ]] || refuse "--$action and $1 together"
        action=${1#--}
        ;;
      --dry-run) dry_run=1 ;;
      -h | --help)
        usage
        return
        ;;
      *) refuse "unknown argument '$1'; --help lists the options" ;;
    esac
    shift
  done
  need_count --retries "$retries"
  need_count --pause "$pause"
  need_count --lines "$lines"
  case $action in
    start)
      check_start
      check_place
      start
      ;;
    logs)
      check_place
      worker_command logs "$lines"
      ;;
    *)
      check_place
      worker_command "$action"
      ;;
  esac
}

main "$@"
