"""Test set-up: four simulated devices, strict promotion, real data found or skipped aloud."""

import os
import pathlib
import sys
from importlib.metadata import version

# Before jax is imported: flags are read once. Most of a test's time is compilation, and LLVM's
# optimisations are most of that, then the emitters of fused loops; `--all` tests with both, as do
# the runs of run_test.py. Test workers have no command line of their own and inherit the decision.
os.environ["RLHF_TEST_XLA_LEVEL"] = os.environ.get(
    "RLHF_TEST_XLA_LEVEL", "3" if "--all" in sys.argv else "0"
)
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4 "
    f"--xla_backend_optimization_level={os.environ['RLHF_TEST_XLA_LEVEL']} "
    # Four simulated devices on two busy cores: XLA aborts the process where one of them comes late.
    "--xla_cpu_collective_call_terminate_timeout_seconds=300 "
)
if os.environ["RLHF_TEST_XLA_LEVEL"] == "0" and version("jaxlib").startswith("0.10."):
    # Later versions cannot do without emitters. See AS_USERS of tests/compiling.py.
    os.environ["XLA_FLAGS"] += "--xla_cpu_use_fusion_emitters=false"
# Size of XLA's pool of threads, which is else the number of cores: collectives of four simulated
# devices that wait for each other in two threads wait for ever.
os.environ["NPROC"] = "8"
# Two workers fill two cores: the threads of torch and numpy would only wait for each other, busily.
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"  # a path that is not there may look like a name on the hub

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
# Simulated devices share one small pool of threads: two programs with collectives in flight at
# once can wait for each other until XLA aborts the process.
jax.config.update("jax_cpu_enable_async_dispatch", False)

DATA = pathlib.Path(os.environ.get("RLHF_DATA", "../shared/data"))
NO_DATA = f"RLHF_DATA={DATA} is absent"


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the slow tests too")


# The files that take longest come first, or one worker would end alone with one of them.
LONGEST = (
    "run_test.py", "notebook_test.py", "update_test.py", "parity_test.py", "save_test.py",
    "adapters_test.py", "export_test.py", "peft_test.py", "peer_faults_test.py",
    "bring_your_model_test.py", "aot_tpu_test.py", "seams_test.py", "bad_input_test.py",
    "stories_test.py", "bad_folder_test.py", "sampler_test.py", "supervised_test.py",
    "checkpoint_test.py", "models_test.py", "real_input_test.py", "quickstart_study_test.py",
    "steps_test.py", "transformer_test.py",
)  # fmt: skip


def pytest_collection_modifyitems(config, items):
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONGEST)))
    for item in items:
        if "slow" in item.keywords and not config.getoption("--all"):
            item.add_marker(pytest.mark.skip(reason="slow; run with --all"))
        needs_data = "data" in item.keywords or "data_dir" in item.fixturenames
        if needs_data and not DATA.is_dir():
            item.add_marker(pytest.mark.skip(reason=NO_DATA))


def pytest_terminal_summary(terminalreporter):
    skipped = terminalreporter.stats.get("skipped", [])
    count = sum(NO_DATA in str(report.longrepr) for report in skipped)
    reason = f"because {NO_DATA}" if count else f"for want of data (RLHF_DATA={DATA})"
    terminalreporter.write_line(f"{count} tests were skipped {reason}")


@pytest.fixture(scope="session")
def data_dir() -> pathlib.Path:
    """The folder with real public data; tests that ask for it carry the mark `data`."""
    return DATA


@pytest.fixture(scope="session", autouse=True)
def kept_programs(tmp_path_factory):
    """What one test compiled no other of this process compiles again.

    What counts compilations counts as before: jax's caches in memory and its events know a program
    from a folder as a new one.
    """
    from tests import compiling  # not with this file: shape checks begin after it was read

    with compiling.shared_programs(tmp_path_factory.mktemp("programs")):
        yield
