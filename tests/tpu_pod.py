"""A stand-in for gcloud and a TPU pod, for tpu_vm_test.py: its workers are folders of this machine.

It takes the place of other people's programs (gcloud, the workers' Python and pip). It runs the
command of `ssh` in every worker's folder, all at once, and copies for `scp`; what runs there are
the scripts that the workers would run.
"""

import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]
WORKERS = 2

# Its state in FOLDER: `log`, what it was called with; `node` and `queue`, states, one per line,
# of which each look takes the first and leaves the last.
GCLOUD = r"""#!/usr/bin/env bash
printf '%q ' "$@" >>'FOLDER/log'; echo >>'FOLDER/log'
what=$3 verb=$4
look() {
  [[ -s $1 ]] || { echo "ERROR: NOT_FOUND: no such resource" >&2; exit 1; }
  head -n 1 "$1"
  [[ $(wc -l <"$1") -eq 1 ]] || sed -i 1d "$1"
}
words=("${@:5}") files=()
for word in "${words[@]}"; do
  case $word in
    --command=*) command=${word#--command=} ;;
    --*) ;;
    *) files+=("$word") ;;
  esac
done
case $what-$verb in
  tpu-vm-describe)
    [[ ! -e FOLDER/broken ]] || { echo 'ERROR: PERMISSION_DENIED' >&2; exit 1; }
    look FOLDER/node ;;
  queued-resources-describe) look FOLDER/queue ;;
  tpu-vm-create) echo READY >FOLDER/node ;;
  queued-resources-create)
    printf '%s\n' WAITING_FOR_RESOURCES PROVISIONING ACTIVE >FOLDER/queue
    echo READY >FOLDER/node ;;
  *-delete) rm -f FOLDER/node FOLDER/queue ;;
  tpu-vm-scp)
    for worker in FOLDER/w-*; do
      cp "${files[@]:0:${#files[@]}-1}" "$worker/${files[-1]#*:}" || exit
    done ;;
  tpu-vm-ssh)
    jobs=()
    for worker in FOLDER/w-*; do
      (cd "$worker" && HOME=$worker HOSTNAME=$(basename "$worker") bash -c "$command") &
      jobs+=($!)
    done
    status=0
    for job in "${jobs[@]}"; do wait "$job" || status=$?; done
    exit "$status" ;;
esac
"""

# Makes "environments" that hold copies of itself and answers -c for real. As a program of ours it
# ends as the line of ~/plan says that belongs to this start.
PYTHON = r"""#!/usr/bin/env bash
case "$1 ${2:-}" in
  "-c "*) exec REAL "$@" ;;
  "-m venv")
    mkdir -p "${@: -1}/bin"
    touch "${@: -1}/pyvenv.cfg"
    cp "$0" "${@: -1}/bin/python" ;;
  "-m pip") [[ $3 != install ]] || printf 'pip %s\n' "${@: -1}" >>"$HOME/pip" ;;
  "-m rlhf_jax."*)
    printf '%s\0' "$@" "$JAX_PLATFORMS" "$PWD" >"$HOME/arguments"
    echo started >>"$HOME/starts"
    echo "a line of $HOSTNAME"
    for word; do
      case $word in --workdir=*) echo "$HOSTNAME" >>"${word#--workdir=}/steps" ;; esac
    done
    plan=$(sed -n "$(wc -l <"$HOME/starts")p" "$HOME/plan")
    [[ $plan != hang ]] || exec sleep 300
    exit "$plan" ;;
esac
"""


class Pod:
    """A repository with the scripts, a stand-in gcloud, and two workers."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.house = folder / "a house"  # a blank in the path, on purpose
        shutil.copytree(ROOT / "launch", self.house / "launch")
        shutil.copytree(ROOT / "configs", self.house / "configs")
        (self.house / "rlhf_jax").mkdir()
        for path in (ROOT / "rlhf_jax").glob("*.py"):
            shutil.copy(path, self.house / "rlhf_jax")
        shutil.copy(ROOT / "setup.py", self.house)
        (self.house / ".gitignore").write_text("secret\n__pycache__/\n")
        subprocess.run(["git", "init", "--quiet"], cwd=self.house, check=True)
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.program("gcloud", GCLOUD.replace("FOLDER", str(folder)))
        # setup.sh takes the newest that runs.
        self.program("python3.20", PYTHON.replace("REAL", sys.executable))
        self.workers = [folder / f"w-{i}" for i in range(WORKERS)]
        for worker in self.workers:
            worker.mkdir()
        self.workdir = folder / "a shared folder" / "run"

    def program(self, name: str, text: str):
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def script(self, name: str, *arguments, with_gcloud=True):
        path = f"{self.bin}:{os.environ['PATH']}" if with_gcloud else tools(self.folder)
        kept = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "PYTHON")}
        return subprocess.run(
            ["bash", str(self.house / "launch" / name), *map(str, arguments)],
            env=kept | {"PATH": path},
            cwd=self.house,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def create(self, *more, **options):
        place = ("--name=pod", "--zone", "here-1a", "--type=v5litepod-16", "--poll=0")
        return self.script("tpu_vm_create.sh", *place, *more, **options)

    def run(self, *more, **options):
        return self.script("tpu_vm_run.sh", "--name=pod", "--zone=here-1a", *more, **options)

    def start(self, *more, **options):
        where = ("--config=configs/quickstart.py:small", f"--workdir={self.workdir}", "--pause=0")
        return self.run(*where, *more, **options)

    def plan(self, *plans: str):
        for worker, plan in zip(self.workers, plans, strict=True):
            (worker / "plan").write_text(plan.replace(" ", "\n") + "\n")
            (worker / "starts").unlink(missing_ok=True)

    def starts(self) -> list[int]:
        paths = [worker / "starts" for worker in self.workers]
        return [len(path.read_text().split()) if path.exists() else 0 for path in paths]

    def says(self) -> list[str]:
        lines = self.run("--status").stdout.splitlines()
        return [line.partition(": ")[2] for line in sorted(lines)]

    def wait_for(self, *words: str):
        """Until every worker's state starts with its word."""
        deadline = time.monotonic() + 30
        while not all(s.startswith(w) for s, w in zip(self.says(), words, strict=True)):
            assert time.monotonic() < deadline, self.run("--logs").stdout
            time.sleep(0.2)

    def wait_until_started(self):
        """Until every worker's program has written what it was called with."""
        deadline = time.monotonic() + 30
        while not all((worker / "arguments").exists() for worker in self.workers):
            assert time.monotonic() < deadline, self.run("--logs").stdout
            time.sleep(0.1)

    def arguments(self, worker: int = 0) -> list[str]:
        return (self.workers[worker] / "arguments").read_text().split("\0")[:-1]

    def calls(self) -> list[list[str]]:
        path = self.folder / "log"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [shlex.split(line) for line in lines]


def tools(folder: pathlib.Path) -> str:
    """A PATH without gcloud and Python."""
    place = folder / "tools"
    place.mkdir(exist_ok=True)
    for name in ("bash", "basename", "cat", "date", "dirname", "git", "grep", "paste", "sed"):
        (place / name).unlink(missing_ok=True)
        (place / name).symlink_to(shutil.which(name))
    return str(place)
