"""The bash scripts: linted, and run against a stand-in Python that only records its calls.

The stand-in takes the place of *other people's* programs (pip, venv, ruff, pytest); what is
tested is the scripts' own logic. A real installation is what launch/test.sh does before this.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import textwrap

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = sorted([*ROOT.glob("launch/*.sh"), *ROOT.glob("benchmarks/*.sh"), ROOT / ".ci/run"])

TOOLS = ["bash", "basename", "cat", "cp", "dirname", "grep", "ls", "mkdir", "mv", "paste", "sed"]
TOOLS += ["sort", "touch", "tr"]

# Makes "environments" that hold copies of itself, records the rest, answers -c for real.
STAND_IN = """\
#!/usr/bin/env bash
case "$1 ${2:-}" in
  "-c "*) exec REAL "$@" ;;
  "-m venv")
    mkdir -p "${@: -1}/bin"
    touch "${@: -1}/pyvenv.cfg"
    for name in python ruff; do cp "$0" "${@: -1}/bin/$name"; done
    ;;
  "-m pip") [[ $3 != install ]] || printf 'pip %s\\n' "${@: -1}" >>LOG ;;
  *)
    printf '%s\\n' "$(basename "$0") $*" >>LOG
    [[ "$*" != *"${FAIL_ON:-never}"* ]]
    ;;
esac
"""


class House:
    """A copy of what the scripts touch, with the stand-in as the only Python."""

    def __init__(self, folder: pathlib.Path):
        self.root = folder / "a house"  # a blank in the path, on purpose
        self.log = folder / "log"
        self.bin = folder / "bin"
        self.bin.mkdir()
        shutil.copytree(ROOT / "launch", self.root / "launch")
        shutil.copytree(ROOT / ".ci", self.root / ".ci")
        shutil.copy(ROOT / "setup.py", self.root)
        text = STAND_IN.replace("REAL", sys.executable).replace("LOG", f"'{self.log}'")
        self.python = self.program("python3.11", text)

    def program(self, name: str, text: str) -> pathlib.Path:
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def run(self, script, *arguments, cwd=None, **environment):
        kept = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "RLHF_VENV")}
        # Only the stand-in and the system's tools: no real Python can be picked by accident.
        path = f"{self.bin}:{self.tools()}"
        return subprocess.run(
            ["bash", str(self.root / script), *map(str, arguments)],
            env=kept | {"PATH": path} | environment,
            cwd=cwd or self.root,
            capture_output=True,
            text=True,
        )

    def tools(self) -> pathlib.Path:
        folder = self.bin.parent / "tools"
        folder.mkdir(exist_ok=True)
        for name in TOOLS:
            if not (folder / name).exists():
                (folder / name).symlink_to(shutil.which(name))
        return folder

    def calls(self) -> list[str]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines


@pytest.fixture
def house(tmp_path):
    return House(tmp_path)


def test_scripts_pass_shellcheck():
    beside = pathlib.Path(sys.executable).with_name("shellcheck")
    program = str(beside) if beside.exists() else shutil.which("shellcheck")
    assert program, "shellcheck is missing: install the extra `test`"
    assert len(SCRIPTS) >= 5
    done = subprocess.run([program, *map(str, SCRIPTS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_ci_calls_the_test_script_and_nothing_else(house):
    lines = (ROOT / ".ci/run").read_text().splitlines()
    assert lines[-1] == "exec bash launch/test.sh"
    assert len(lines) == 4
    assert os.access(ROOT / ".ci/run", os.X_OK)
    assert house.run(".ci/run", cwd="/").returncode == 0
    assert any(call.startswith("python -m pytest") for call in house.calls())


def test_setup_is_idempotent(house):
    first = house.run("launch/setup.sh", "test")
    assert first.returncode == 0, first.stderr
    assert house.calls() == ["pip .[test]"]
    assert (house.root / ".venv/bin/python").exists()

    again = house.run("launch/setup.sh", "test")
    assert again.returncode == 0, again.stderr
    assert "up to date" in again.stdout
    fewer = house.run("launch/setup.sh")
    assert fewer.returncode == 0
    assert house.calls() == []


def test_setup_adds_extras_to_those_that_are_there(house):
    house.run("launch/setup.sh", "--gpu")
    house.run("launch/setup.sh", "test", "notebooks")
    house.run("launch/setup.sh", "test", "--gpu")
    assert house.calls() == ["pip .[gpu]", "pip .[gpu,notebooks,test]"]


def test_setup_installs_again_when_setup_py_changes(house):
    house.run("launch/setup.sh")
    assert house.calls() == ["pip ."]
    with (house.root / "setup.py").open("a") as file:
        file.write("# changed\n")
    house.run("launch/setup.sh")
    assert house.calls() == ["pip ."]


def test_setup_takes_the_newest_python_that_works(house):
    fails = '#!/usr/bin/env bash\necho "pyenv: command not found" >&2\nexit 127\n'
    no_ensurepip = "#!/usr/bin/env bash\n[[ $2 != *ensurepip* ]]\n"
    house.program("python3.14", fails)
    house.program("python3.13", no_ensurepip)
    assert house.run("launch/setup.sh", "--which").stdout == f"{house.python}\n"
    newer = house.program("python3.12", house.python.read_text())
    assert house.run("launch/setup.sh", "--which").stdout == f"{newer}\n"
    chosen = house.run("launch/setup.sh", "--which", PYTHON=str(house.python))
    assert chosen.stdout == f"{house.python}\n"


def test_setup_finds_a_python_behind_a_shim_of_the_same_name(house, tmp_path):
    shims = tmp_path / "shims"
    shims.mkdir()
    shim = shims / "python3.11"
    shim.write_text("#!/usr/bin/env bash\nexit 127\n")
    shim.chmod(0o755)
    path = f"{shims}:{house.bin}:{house.tools()}"
    assert house.run("launch/setup.sh", "--which", PATH=path).stdout == f"{house.python}\n"


def test_setup_says_what_is_wrong(house, tmp_path):
    def error(*arguments, **environment):
        done = house.run("launch/setup.sh", *arguments, **environment)
        assert done.returncode == 1
        return done.stderr

    broken = house.program("broken", "#!/usr/bin/env bash\nexit 127\n")
    assert "ensurepip" in error(PYTHON=str(broken))
    assert "PYTHON" in error(PATH=str(house.tools()))
    assert "no extra 'tests'" in error("tests")
    wrong = house.run("launch/setup.sh", "--cuda")  # a command line, as everywhere: status 2
    assert wrong.returncode == 2 and "unknown option --cuda" in wrong.stderr
    house.run("launch/setup.sh")
    (house.root / ".venv/bin/python").write_text(
        "#!/usr/bin/env bash\n[[ $2 == pip ]] || echo 3.10\n"
    )
    assert "Python 3.10" in error()


def test_setup_never_clears_a_folder_that_is_no_environment(house, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    done = house.run("launch/setup.sh", RLHF_VENV=str(home))
    assert done.returncode == 1
    assert "no virtual environment" in done.stderr
    assert (home / "thesis.tex").read_text() == "years of work"


def test_setup_that_failed_is_tried_again(house):
    text = house.python.read_text()
    house.program(
        "python3.11", text.replace('"-m pip") ', '"-m pip") [[ $3 != install ]] || exit 1;')
    )
    failed = house.run("launch/setup.sh")
    assert failed.returncode == 1
    assert "pip could not install" in failed.stderr
    (house.root / ".venv/bin/python").write_text(text)
    assert house.run("launch/setup.sh").returncode == 0
    assert house.calls() == ["pip ."]


def test_quickstart_sets_up_and_runs_the_pipeline(house, tmp_path):
    done = house.run("launch/quickstart.sh", "--workdir", "my run", "--config.seed=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = f"python -m rlhf_jax.pipeline --config=configs/quickstart.py --workdir={tmp_path}/my run"
    assert house.calls() == ["pip .", run + " --config.seed=1"]
    house.run("launch/quickstart.sh", cwd=tmp_path)
    default = f"--workdir={house.root}/runs/quickstart"
    assert house.calls() == [
        f"python -m rlhf_jax.pipeline --config=configs/quickstart.py {default}"
    ]
    assert house.run("launch/quickstart.sh", FAIL_ON="pipeline").returncode == 1


def test_test_script_lints_and_tests(house, tmp_path):
    done = house.run("launch/test.sh", "--all", "tests/ops", cwd=tmp_path, RLHF_VENV="env")
    assert done.returncode == 0, done.stderr
    install, check, form, suite = house.calls()
    assert (install, check, form) == (
        "pip .[test]",
        "ruff check .",
        "ruff format --check .",
    )
    assert suite.startswith("python -m pytest")
    assert suite.endswith("--all tests/ops")
    assert (tmp_path / "env/bin/python").exists()


@pytest.mark.parametrize("part", ["check .", "format --check", "pytest"])
def test_test_script_fails_with_any_part_and_still_runs_the_rest(house, part):
    done = house.run("launch/test.sh", FAIL_ON=part)
    assert done.returncode == 1
    assert "FAILED" in done.stderr
    assert len(house.calls()) == 4


def test_skips_for_absent_data_are_counted_aloud(tmp_path):
    (tmp_path / "some_test.py").write_text(
        textwrap.dedent(
            """
            import pytest

            @pytest.mark.data
            def test_real(data_dir):
                assert data_dir.is_dir()

            @pytest.mark.data
            @pytest.mark.parametrize("i", [1, 2])
            def test_more(data_dir, i):
                assert data_dir.is_dir()

            @pytest.mark.slow
            def test_slow():
                pass

            def test_without_the_mark(data_dir):
                pass
            """
        )
    )
    shutil.copy(ROOT / "tests/conftest.py", tmp_path)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--import-mode=importlib"]
    command += ["-o", "markers=slow: s\ndata: d", "-o", "python_files=*_test.py", tmp_path]
    given = os.environ | {"PYTHONPATH": str(ROOT)}  # the copied conftest.py imports from tests/
    absent = subprocess.run(
        command, env=given | {"RLHF_DATA": "/absent"}, cwd=tmp_path, capture_output=True
    )
    text = absent.stdout.decode()
    assert "4 tests were skipped because RLHF_DATA=/absent is absent" in text
    assert "5 skipped" in text
    there = subprocess.run(
        command, env=given | {"RLHF_DATA": str(tmp_path)}, cwd=tmp_path, capture_output=True
    )
    text = there.stdout.decode()
    assert f"0 tests were skipped for want of data (RLHF_DATA={tmp_path})" in text
    assert "4 passed, 1 skipped" in text
