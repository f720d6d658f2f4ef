"""What every command line shares: flags, joining a distributed job, one clear line on bad input."""

import logging
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file; single values by --config.key=value.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder; resumes if it has a checkpoint.")
_COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "host:port of process 0; set it to join a distributed job."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes in the distributed job.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "This process's number, from 0.")
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Join the job that the environment describes (TPU pods, Slurm)."
)

# How ml_collections says which key is unknown, and which one it may have been.
_QUOTED, _HINT = re.compile(r"'(\w+)'"), re.compile(r'Did you mean "(.+?)" instead')
USAGE_ERROR = 2  # exit status for input that a person must mend


def join_job() -> None:
    """Joins the distributed job that the flags or the environment describe, if any."""
    if _COORDINATOR.value is not None:
        missing = [f.name for f in (_NUM_PROCESSES, _PROCESS_ID) if f.value is None]
        if missing:
            raise ValueError(f"--coordinator_address also needs --{' and --'.join(missing)}")
        jax.distributed.initialize(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    elif _DISTRIBUTED.value:
        jax.distributed.initialize()


def set_up_logging() -> None:
    """Our own messages from INFO on, everybody else's from WARNING on."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    ours = logging.getLogger("rlhf_jax")
    ours.setLevel(logging.INFO)
    ours.addHandler(handler)
    ours.propagate = False


def is_ours(error: BaseException) -> bool:
    """Whether ``error`` was raised in this package, not in a library that it called."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and _in_package(frames[-1])


def _in_package(frame: traceback.FrameSummary) -> bool:
    return pathlib.Path(__file__).parent in pathlib.Path(frame.filename).parents


def missing_key(error: AttributeError) -> ValueError | None:
    """What to say where this package read a key that the config does not have; else None."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if _in_package(frame)]
    if not ours or "ml_collections" not in frames[-1].filename:
        return None
    reader, key = ours[-1], _said(error).strip("\"'")
    return ValueError(
        f"the config lacks the key {key!r}, read in {pathlib.Path(reader.filename).name} line "
        f"{reader.lineno}: {reader.line}; is it a config for another program?"
    )


def _said(error: AttributeError) -> str:
    """The text of ml_collections, which wraps a KeyError."""
    cause = error.args[0] if error.args else error
    return str(cause.args[0]) if isinstance(cause, KeyError) else str(cause)


def fail(error: Exception) -> NoReturn:
    """One line for the person at the keyboard.

    In a distributed job the process ends without waiting for the others at the exit: they may
    be waiting for this one, and its end is what tells them.
    """
    print(f"error: {error}", file=sys.stderr, flush=True)
    if jax.distributed.is_initialized():
        os._exit(USAGE_ERROR)
    sys.exit(USAGE_ERROR)


def unknown_key(error: AttributeError, argv: Sequence[str]) -> ValueError:
    """What to say of ``--config.a.b=value`` where the config has no ``a.b``."""
    text = _said(error)
    key, hint = _QUOTED.search(text), _HINT.search(text)
    named = [arg for arg in argv if key and arg.partition("=")[0].endswith(f".{key[1]}")]
    return ValueError(
        f"{' or '.join(named) or text}: the config has no such key"
        + (f"; did you mean {hint[1]!r}?" if hint else "")
    )


def parse(argv: Sequence[str]) -> list[str]:
    """The command line; a config file that is absent and a key that is unknown end at once."""
    try:
        rest = flags.FLAGS(argv)
        if _CONFIG.value is not None:
            _CONFIG.value.lock()  # raises what went wrong when the file was loaded
        return rest
    except (flags.Error, OSError, AttributeError, ValueError) as error:
        # ml_collections wraps what went wrong in a report; the fault itself stands last.
        if isinstance(error, AttributeError):
            fail(unknown_key(error, argv))
        lines = [line.strip() for line in str(error).splitlines()]
        fail(ValueError(next((line for line in reversed(lines) if line), repr(error))))


def run_program(main: Callable[[ConfigDict, str], Any]) -> None:
    """Parses the command line and calls ``main(config, workdir)``.

    A `ValueError` that this package raised is bad input from a person, as is a config without a
    key that this package reads: one line on stderr and exit status 2. Everything else is a fault
    and keeps its traceback.
    """

    def start(argv: list[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
        set_up_logging()
        try:
            join_job()
            main(_CONFIG.value, _WORKDIR.value)
        except ValueError as error:
            if not is_ours(error):
                raise
            fail(error)
        except AttributeError as error:
            said = missing_key(error)
            if said is None:
                raise
            fail(said)

    for flag in (_CONFIG, _WORKDIR, _COORDINATOR, _NUM_PROCESSES, _PROCESS_ID, _DISTRIBUTED):
        # --help lists the flags of the program that was started.
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[flag.name])
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(start, flags_parser=parse)
