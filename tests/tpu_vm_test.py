"""The scripts for TPU VMs: input, --dry-run, and whole runs on the stand-in of tpu_pod.py."""

import os
import shlex
import subprocess

import pytest

from tests.tpu_pod import ROOT, Pod


@pytest.fixture
def pod(tmp_path):
    pod = Pod(tmp_path)
    yield pod
    pod.run("--stop")


@pytest.fixture(scope="module")
def idle_pod(tmp_path_factory):
    """For what never starts anything."""
    return Pod(tmp_path_factory.mktemp("idle"))


def commands(done) -> list[list[str]]:
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def remote(command: list[str]) -> list[str]:
    """What a worker's shell makes of an ssh command."""
    assert command[:5] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh"]
    assert "--worker=all" in command
    return shlex.split(command[-1].removeprefix("--command="))


# Creating.


@pytest.mark.parametrize("queued", [False, True])
def test_dry_run_of_create_prints_every_command(pod, queued):
    more = ["--queued", "--spot"] if queued else []
    done = pod.create(*more, "--project=p", "--before=mount 'a b'", "--dry-run", with_gcloud=False)
    lines = commands(done)
    place = ["--zone=here-1a", "--project=p"]
    assert all(place == [w for w in line if w in place] for line in lines if line[0] == "gcloud")
    kinds = [line[3:5] if line[0] == "gcloud" else line[0] for line in lines]
    looks = [["queued-resources", "describe"]] if queued else []
    looks += [["tpu-vm", "describe"]]
    what = "queued-resources" if queued else "tpu-vm"
    ssh, scp = ["tpu-vm", "ssh"], ["tpu-vm", "scp"]
    assert kinds == [*looks, [what, "create"], ssh, "git", "tar", ssh, scp, ssh]
    create = lines[len(looks)]
    assert "--accelerator-type=v5litepod-16" in create and create[5] == "pod"
    if queued:
        assert {"--spot", "--node-id=pod", "--runtime-version=v2-alpha-tpuv5-lite"} < set(create)
    else:
        assert "--version=v2-alpha-tpuv5-lite" in create and "--spot" not in create
    assert remote(lines[len(looks) + 1]) == ["mount", "a b"]
    assert remote(lines[-1]) == ["bash", "rlhf_jax/shipped/tpu_vm_worker.sh", "install"]
    assert not (pod.workers[0] / "rlhf_jax").exists()


def created(pod) -> int:
    return sum(call[3] == "create" for call in pod.calls())


def test_create_makes_the_vm_once_and_installs_on_all_workers(pod):
    first = pod.create("--before=echo mounted >>before")
    assert first.returncode == 0, first.stderr
    assert created(pod) == 1
    again = pod.create("--before=echo mounted >>before")
    assert again.returncode == 0, again.stderr
    assert "not created again" in again.stdout and created(pod) == 0
    for worker in pod.workers:
        assert (worker / "pip").read_text() == "pip .[tpu]\n"  # once
        assert (worker / "rlhf_jax/venv/bin/python").exists()
        assert (worker / "before").read_text() == "mounted\n" * 2


def test_create_waits_for_a_queued_resource(pod):
    done = pod.create("--queued", "--spot")
    assert done.returncode == 0, done.stderr
    assert "pod is WAITING_FOR_RESOURCES; waiting" in done.stdout
    calls = pod.calls()
    assert [c[2] for c in calls if c[3] == "create"] == ["queued-resources"]
    assert all((worker / "rlhf_jax/venv").is_dir() for worker in pod.workers)


@pytest.mark.parametrize("queued", [False, True])
def test_a_preempted_vm_is_replaced_when_that_is_asked_for(pod, queued):
    more = ["--queued"] if queued else []
    (pod.folder / "node").write_text("PREEMPTED\n")
    if queued:
        (pod.folder / "queue").write_text("SUSPENDED\n")
    kept = pod.create(*more)
    assert kept.returncode == 1 and "--recreate" in kept.stderr
    assert created(pod) == 0
    done = pod.create(*more, "--recreate")
    assert done.returncode == 0, done.stderr
    verbs = [call[3] for call in pod.calls() if call[3] in ("create", "delete")]
    assert verbs == ["delete", "create"]
    assert pod.create(*more, "--recreate").returncode == 0
    assert not any(call[3] in ("create", "delete") for call in pod.calls())


def test_what_gcloud_says_is_not_taken_for_an_absent_vm(pod):
    (pod.folder / "broken").touch()
    done = pod.create()
    assert done.returncode == 1 and "PERMISSION_DENIED" in done.stderr
    assert created(pod) == 0


# Input that a person must mend.

RUN = ("tpu_vm_run.sh", "--name=a", "--zone=z", "--config=configs/quickstart.py", "--workdir=/w")
CREATE = ("tpu_vm_create.sh", "--name=a", "--zone=z", "--type=v4-32")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([*CREATE, "--typ=v4-8"], "unknown argument '--typ'"),
        ([*CREATE, "--spot=yes"], "unknown argument 'yes'"),
        ([*CREATE, "--zone"], "--zone needs a value"),
        ([*CREATE, "--name", "--spot"], "--name needs a value"),
        ([*CREATE, "--name=A b"], "--name 'A b'"),
        ([*CREATE, "--type=tpu"], "not like v5litepod-16"),
        ([*CREATE, "--type=v9-8"], "--version is missing"),
        ([*CREATE, "--poll=often"], "--poll needs a number"),
        (CREATE[:3], "--type is missing"),
        ([CREATE[0], *CREATE[2:]], "--name is missing"),
        ([*RUN, "--steps=3"], "unknown argument '--steps'"),
        ([*RUN, "configs"], "unknown argument 'configs'"),
        ([*RUN, "--retries=-1"], "--retries needs a number"),
        ([*RUN, "--program=mesh"], "--program 'mesh': the programs are evaluate "),
        ([*RUN, "--program=../x"], "--program '../x'"),
        ([*RUN, "--config=configs/absent.py"], "no file configs/absent.py"),
        ([*RUN, "--config=configs"], "no file configs"),
        ([*RUN, "--workdir=gs://bucket/run"], "mount the bucket"),
        ([*RUN, "--workdir=runs/a"], "must be absolute"),
        ([*RUN, "--workdir=/home/me/rlhf_jax/code/runs/a"], "every start replaces"),
        ([*RUN, "--stop", "--logs"], "--stop and --logs together"),
        (RUN[:4], "--workdir is missing"),
        ([*RUN[:3], "--workdir=/w"], "--config is missing"),
        ([*RUN[:2], *RUN[3:]], "--zone is missing"),
    ],
)
def test_wrong_input_is_refused_in_one_line(idle_pod, command, message):
    done = idle_pod.script(*command)
    assert done.returncode == 2
    assert message in done.stderr and len(done.stderr.splitlines()) == 1
    assert idle_pod.calls() == [] and done.stdout == ""


def test_help_is_shown_and_gcloud_is_asked_for(idle_pod):
    for name in ("tpu_vm_create.sh", "tpu_vm_run.sh"):
        shown = idle_pod.script(name, "--help", with_gcloud=False)
        assert shown.returncode == 0 and f"usage: launch/{name}" in shown.stdout
    done = idle_pod.run("--stop", with_gcloud=False)
    assert done.returncode == 1 and "gcloud is not on PATH" in done.stderr


def test_the_commands_of_the_page_are_understood(idle_pod):
    page = (ROOT / "docs/running_on_tpu.md").read_text()
    blocks = [block.partition("\n```")[0] for block in page.split("```bash\n")[1:]]
    assert len(blocks) >= 5
    for block in blocks:
        if "launch/tpu_vm_" in block:
            for command in block.replace("\\\n", " ").split("bash launch/")[1:]:
                done = idle_pod.script(*shlex.split(command), "--dry-run")
                assert done.returncode == 0, done.stderr
    assert idle_pod.calls() == []


# Running.

HARD = """--config.data.template=it's {question} "$HOME" `id` \\ *\t& ü;\nlast"""


def test_dry_run_of_run_prints_every_command(pod):
    done = pod.start(
        "--program=train_policy", '--config.a=it\'s "b" $HOME', "--dry-run", with_gcloud=False
    )
    lines = commands(done)
    kinds = [line[4] if line[0] == "gcloud" else line[0] for line in lines]
    assert kinds == ["git", "tar", "ssh", "scp", "ssh", "ssh"]
    assert lines[3][-4:-2] == [
        str(pod.house / "launch/tpu_vm_worker.sh"),
        "pod:rlhf_jax/shipped/",
    ]
    start = remote(lines[-1])
    assert start[:3] == ["bash", "rlhf_jax/shipped/tpu_vm_worker.sh", "start"]
    assert start[4:] == [
        *("N", "3", "0", "train_policy", str(pod.workdir)),
        *("--config=configs/quickstart.py:small", '--config.a=it\'s "b" $HOME'),
    ]
    restart = commands(pod.start("--restart", "--dry-run"))
    assert [remote(line)[2:] for line in restart[-3:-1]] == [["stop"], ["install"]]
    for action in ("--stop", "--status", "--logs"):
        (line,) = commands(pod.run(action, "--dry-run"))
        assert remote(line)[2] == action.removeprefix("--")
    assert pod.calls() == []


def test_code_and_arguments_arrive_on_every_worker(pod):
    pod.plan("0", "0")
    (pod.house / "rlhf_jax/new file.py").write_text("new = 1\n")
    (pod.house / "secret").write_text("not shipped")
    gone = pod.house / "configs/gone.py"
    gone.touch()
    subprocess.run(["git", "add", "configs"], cwd=pod.house, check=True)
    gone.unlink()
    done = pod.start(HARD, "--program", "train_policy")
    assert done.returncode == 0, done.stderr
    assert "started train_policy on 2 workers" in done.stdout
    pod.wait_for("finished", "finished")
    for number, worker in enumerate(pod.workers):
        code = worker / "rlhf_jax/code"
        assert (code / "rlhf_jax/new file.py").read_text() == "new = 1\n"
        config = (code / "configs/quickstart.py").read_bytes()
        assert config == (ROOT / "configs/quickstart.py").read_bytes()
        assert not (code / "secret").exists() and not (code / "configs/gone.py").exists()
        assert pod.arguments(number) == [
            *("-m", "rlhf_jax.train_policy", "--distributed", f"--workdir={pod.workdir}"),
            *("--config=configs/quickstart.py:small", HARD, "tpu,cpu", str(code)),
        ]
    logs = pod.run("--logs").stdout
    assert "w-0| a line of w-0" in logs and "w-1| a line of w-1" in logs


def test_a_config_that_git_does_not_ship_arrives_too(pod):
    pod.plan("0", "0")
    (pod.folder / "mine.py").write_text("mine = 1\n")
    done = pod.start(f"--config={pod.folder}/mine.py:small")
    assert done.returncode == 0, done.stderr
    pod.wait_for("finished", "finished")
    assert "--config=shipped_configs/mine.py:small" in pod.arguments()
    for worker in pod.workers:
        shipped = worker / "rlhf_jax/code/shipped_configs/mine.py"
        assert shipped.read_text() == "mine = 1\n"


def test_when_a_worker_fails_all_are_started_again(pod):
    pod.plan("hang 0", "1 0")
    assert pod.start().returncode == 0
    pod.wait_for("finished", "finished")
    assert pod.starts() == [2, 2]
    assert "another worker failed" in pod.run("--logs").stdout


def test_restarts_are_bounded(pod):
    pod.plan("1 1 1", "1 1 1")
    assert pod.start("--retries=1").returncode == 0
    pod.wait_for("failed with status", "failed with status")
    # Who fails second may be ended by the first one's failure.
    assert "failed with status 1 after 2 starts" in pod.says()
    assert pod.starts() == [2, 2]


def test_bad_input_is_not_tried_again(pod):
    pod.plan("hang 0", "2 0")
    assert pod.start("--pause=1").returncode == 0
    pod.wait_for("stopped: another worker found bad input", "stopped: bad input (status 2)")
    assert pod.starts() == [1, 1]


def test_one_run_at_a_time(pod):
    pod.plan("hang 0", "hang 0")
    assert pod.start().returncode == 0
    pod.wait_for("running", "running")
    (pod.house / "configs/later.py").touch()
    second = pod.start()
    assert second.returncode == 1
    assert "w-0: a run (or an installation) is going on" in second.stderr
    assert "nothing was started" in second.stderr
    assert not (pod.workers[0] / "rlhf_jax/code/configs/later.py").exists()
    assert pod.says() == ["running, start 1 of 4"] * 2 and pod.starts() == [1, 1]

    third = pod.start("--restart")
    assert third.returncode == 0, third.stderr
    pod.wait_for("finished", "finished")
    assert pod.starts() == [2, 2]


def test_a_stopped_run_goes_on_in_its_workdir(pod):
    pod.plan("hang 0", "hang 0")
    assert pod.start().returncode == 0
    pod.wait_for("running", "running")
    pod.wait_until_started()
    assert pod.run("--stop").returncode == 0
    assert pod.says() == ["stopped", "stopped"]
    assert "nothing is running" in pod.run("--stop").stdout
    first = pod.arguments()
    assert pod.start().returncode == 0
    pod.wait_for("finished", "finished")
    assert pod.arguments() == first  # the program resumes by itself
    assert sorted((pod.workdir / "steps").read_text().split()) == ["w-0"] * 2 + ["w-1"] * 2


def test_a_run_that_vanished_does_not_look_alive(pod):
    pod.plan("hang 0", "hang 0")
    assert pod.start().returncode == 0
    pod.wait_for("running", "running")
    group = int((pod.workers[1] / "rlhf_jax/pid").read_text())
    os.killpg(group, 9)
    pod.wait_for("running", "ended without a word")
    refused = pod.start()
    assert refused.returncode == 1 and "w-0: a run" in refused.stderr
    assert pod.starts() == [1, 1]
