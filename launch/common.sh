# shellcheck shell=bash
# What tpu_vm_create.sh and tpu_vm_run.sh share; sourced, not run.
script=launch/$(basename "$0")
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
name='' zone='' project='' dry_run=0 place=()

fail() {
  printf '%s: %s\n' "$script" "$*" >&2
  exit 1
}

# For input that a person must mend.
refuse() {
  printf '%s: %s\n' "$script" "$*" >&2
  exit 2
}

# Refuses an option ($1) without a value ($2).
need_value() {
  [[ $# -gt 1 && -n $2 && $2 != --* ]] || refuse "$1 needs a value"
}

need_count() {
  [[ $2 =~ ^[0-9]+$ ]] || refuse "$1 needs a number, not '$2'"
}

check_place() {
  [[ -n $name ]] || refuse '--name is missing'
  [[ $name =~ ^[a-z][-a-z0-9]*$ ]] \
    || refuse "--name '$name': small letters, digits and hyphens, a letter first"
  [[ -n $zone ]] || refuse '--zone is missing'
  place=(--zone="$zone")
  [[ -z $project ]] || place+=(--project="$project")
  ((dry_run)) || type -P gcloud >/dev/null || fail 'gcloud is not on PATH'
}

# One line that a shell reads back as the same words.
quote() {
  local line
  printf -v line '%q ' "$@"
  printf '%s' "${line% }"
}

# Runs a command, or only prints it with --dry-run.
run() {
  if ((dry_run)); then
    printf '%s\n' "$(quote "$@")"
  else
    "$@"
  fi
}

on_all_workers() {
  run gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker=all --command="$1"
}

# A call of the part that runs on the workers.
worker_command() {
  on_all_workers "bash rlhf_jax/shipped/tpu_vm_worker.sh $(quote "$@")"
}

# Packs the tree as git sees it (tracked, and new files that are not ignored) into folder $1; a
# config from elsewhere ($2, may be empty) goes into the archive's shipped_configs/.
pack() {
  local folder=$1 config=$2 file
  local list=(git -C "$root" ls-files -z --cached --others --exclude-standard)
  local tar=(tar -C "$root" --null -T "$folder/files" -cf "$folder/code.tar")
  local add=(tar -C "$folder" -rf "$folder/code.tar" shipped_configs)
  if ((dry_run)); then
    run "${list[@]}"
    run "${tar[@]}"
    [[ -z $config ]] || run "${add[@]}"
    return
  fi
  "${list[@]}" >"$folder/listed" || fail "$root is no git repository: git says what to ship"
  while IFS= read -r -d '' file; do
    # Tracked files that were deleted are listed too.
    if [[ -e $root/$file || -L $root/$file ]]; then printf '%s\0' "$file"; fi
  done <"$folder/listed" >"$folder/files"
  # Without COPYFILE_DISABLE macOS adds files of its own.
  COPYFILE_DISABLE=1 "${tar[@]}"
  if [[ -n $config ]]; then
    mkdir "$folder/shipped_configs"
    cp "$config" "$folder/shipped_configs/"
    COPYFILE_DISABLE=1 "${add[@]}"
  fi
}

# Copies the code, a config from elsewhere ($1, may be empty) and the workers' part to all workers.
ship() {
  local folder=${TMPDIR:-/tmp}/rlhf_jax.XXXXXX
  if ! ((dry_run)); then
    scratch=$(mktemp -d "$folder")
    trap 'rm -rf "$scratch"' EXIT
    folder=$scratch
  fi
  pack "$folder" "$1"
  on_all_workers 'mkdir -p rlhf_jax/shipped'
  run gcloud compute tpus tpu-vm scp "$folder/code.tar" "$root/launch/tpu_vm_worker.sh" \
    "$name:rlhf_jax/shipped/" "${place[@]}" --worker=all
}
