"""The command line: bad input is one line on stderr and exit status 2, at once."""

import pytest

from tests.processes import ends_of

BAD = (
    ("--config.rollout.prompts=7", "rollout.prompts=7"),
    ("--config.rollout.promts=8", "--config.rollout.promts=8: the config has no such key"),
    ("--config.rollout.promts=8", "did you mean 'prompts'?"),
    ("--config.model.layers=3", "--config.model.layers=3: the config has no such key"),
    ("--coordinator_address=127.0.0.1:1", "--num_processes"),
)
FOREIGN = (("train_policy", "quickstart", "order"), ("pipeline", "ppo_tiny", "algorithm"))


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """How every command line of this file ended, and the folder that none should have made."""
    folder = tmp_path_factory.mktemp("ends")
    workdir = folder / "run"
    tiny = ("train_policy", "--config=configs/ppo_tiny.py", f"--workdir={workdir}")
    lines = [(*tiny, flag) for flag, _ in BAD]
    lines += [
        (program, f"--config=configs/{config}.py", f"--workdir={workdir}")
        for program, config, _ in FOREIGN
    ]
    lines += [("evaluate", "--help")]
    return ends_of(lines, folder / "said"), workdir


@pytest.mark.parametrize("case", range(len(BAD)), ids=[message for _, message in BAD])
def test_bad_input_ends_with_one_line_and_status_2(ends, case):
    found, workdir = ends
    done, (_, message) = found[case], BAD[case]
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in done.stderr
    assert "Traceback" not in done.stderr
    assert not workdir.exists()


@pytest.mark.parametrize("case", range(len(FOREIGN)), ids=[case[0] for case in FOREIGN])
def test_the_config_of_another_program(ends, case):
    found, workdir = ends
    done, (*_, key) = found[len(BAD) + case], FOREIGN[case]
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: {key}: no such key")
    assert last.endswith("is it a config for another program?")
    assert "Traceback" not in done.stderr and not workdir.exists()


def test_help_lists_the_flags(ends):
    shown = ends[0][-1].stdout
    assert "--config" in shown and "--workdir" in shown and "--coordinator_address" in shown
