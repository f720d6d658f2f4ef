"""Programs in processes of their own, as a shell starts them and sees them end."""

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).parents[1]

# Imports what programs import, then forks for every command line and runs the program in the fork
# as `python -m` does. Started programs are one-line failures and --help: none reaches a device.
_FORKS = """
import importlib, json, os, runpy, sys, warnings

warnings.filterwarnings("ignore", r"os\\.fork\\(\\) was called", RuntimeWarning)
importlib.import_module("rlhf_jax.pipeline")
for number, (program, *flags) in enumerate(json.loads(sys.argv[1])):
    child = os.fork()
    if child == 0:
        for name, stream in (("out", 1), ("err", 2)):
            file = os.open(f"{sys.argv[2]}/{number}.{name}", os.O_WRONLY | os.O_CREAT, 0o600)
            os.dup2(file, stream)
        sys.argv[1:] = flags
        sys.modules.pop(f"rlhf_jax.{program}", None)  # as if it had not been imported
        runpy.run_module(f"rlhf_jax.{program}", run_name="__main__", alter_sys=True)
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def environment(**changes: str) -> dict[str, str]:
    """This process's variables for a program of its own, which finds what users have installed."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests/base_install")))
    quiet = {"TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}  # it says that there is no torch
    return {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path, **quiet, **changes}


def ends_of(
    lines: Sequence[tuple[str, ...]], folder: pathlib.Path
) -> list[subprocess.CompletedProcess[str]]:
    """How each command line (program, flag, ...) ends: its status and all that it writes.

    Every one is a process; what they import alike is imported once.
    """
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", _FORKS, json.dumps(lines), str(folder)],
        cwd=ROOT,
        env=environment(XLA_FLAGS=""),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [
        subprocess.CompletedProcess(
            line,
            int(status),
            *((folder / f"{number}.{name}").read_text() for name in ("out", "err")),
        )
        for number, (line, status) in enumerate(zip(lines, done.stdout.split(), strict=True))
    ]
