"""What every command line shares: flags, joining a distributed job, one clear line on bad input."""

import contextlib
import errno
import inspect
import logging
import os
import pathlib
import re
import sys
import traceback
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from rlhf_jax import host_memory, sections
from rlhf_jax.schema import in_package, is_ours

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
_JOB = (_COORDINATOR, _NUM_PROCESSES, _PROCESS_ID, _DISTRIBUTED)
# How the flag of a parameter of each type is defined; see `run_flags`.
_DEFINE = {
    bool: flags.DEFINE_bool,
    bool | None: flags.DEFINE_bool,
    int: flags.DEFINE_integer,
    float | int: flags.DEFINE_float,
    str: flags.DEFINE_string,
}

# How ml_collections says which key is unknown, and which one it may have been.
_QUOTED, _HINT = re.compile(r"'(\w+)'"), re.compile(r'Did you mean "(.+?)" instead')
USAGE_ERROR = 2  # exit status for input that a person must mend
DISK_ERROR = os.EX_IOERR  # 74: what the run had to write was not written; see `disk_fault`
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
# What a config file may raise: it is a person's own program.
_RAISED = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError),
    *(OSError, RuntimeError, SyntaxError, TypeError, ValueError, flags.Error),
)


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
    # What fails in one of orbax's threads is raised again where the run waits for the save.
    absl_logging.get_absl_logger().addFilter(
        lambda record: not (record.exc_info and "orbax" in record.pathname)
    )
    logging.getLogger("asyncio").addFilter(
        lambda record: "os_error_code" not in str(record.exc_info)
    )
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    ours = logging.getLogger("rlhf_jax")
    ours.setLevel(logging.INFO)
    ours.addHandler(handler)
    ours.propagate = False


def set_up() -> None:
    """What a process that trains does first: its log, and one heap for its threads."""
    set_up_logging()
    host_memory.one_heap()


def missing_key(error: AttributeError) -> ValueError | None:
    """What to say where this package read a key that the config does not have; else None."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if in_package(frame)]
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


def fail(error: Exception, status: int = USAGE_ERROR) -> NoReturn:
    """One line for the person at the keyboard.

    In a distributed job the process ends without waiting for the others at the exit: they may
    be waiting for this one, and its end is what tells them.
    """
    line = " ".join(part.strip() for part in str(error).splitlines())
    print(f"error: {line}", file=sys.stderr, flush=True)
    if jax.distributed.is_initialized():
        os._exit(status)
    sys.exit(status)


def unknown_key(error: AttributeError, argv: Sequence[str]) -> ValueError:
    """What to say of ``--config.a.b=value`` where the config has no ``a.b``."""
    text = _said(error)
    key, hint = _QUOTED.search(text), _HINT.search(text)
    named = [arg for arg in argv if key and arg.partition("=")[0].endswith(f".{key[1]}")]
    return ValueError(
        f"{' or '.join(named) or text}: the config has no such key"
        + (f"; did you mean {hint[1]!r}?" if hint else "")
    )


def config_path(argv: Sequence[str]) -> str:
    """The config file that a command line names, without the argument behind the colon."""
    for arg, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = arg.partition("=")
        if name.lstrip("-") == "config":
            return (value if equals else following).partition(":")[0]
    return ""


def raised_in(path: str, error: BaseException) -> ValueError | None:
    """What to say of an exception that came from running the config file; else None.

    ml_collections wraps what it knows in reports, so the whole chain is looked through.
    """
    while error is not None:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f.lineno for f in frames if os.path.abspath(f.filename) == os.path.abspath(path)]
        if isinstance(error, SyntaxError) and error.filename is not None:
            return ValueError(f"{error.filename} line {error.lineno}: SyntaxError: {error.msg}")
        if lines:
            return ValueError(f"{path} line {lines[-1]}: {type(error).__name__}: {error}")
        error = error.__cause__ or error.__context__
    return None


def parse(argv: Sequence[str]) -> list[str]:
    """The command line; a config file that cannot be used and an unknown key end at once."""
    path = config_path(argv)
    try:
        rest = flags.FLAGS(argv)
        if _CONFIG.value is not None:
            _CONFIG.value.lock()  # raises what went wrong when the file was loaded
        return rest
    except _RAISED as error:
        said = raised_in(path, error)
        if said is None and isinstance(error, AttributeError):
            if "'lock'" in str(error) or "'get_config'" in str(error):
                said = ValueError(f"{path}: wanted a function get_config that returns a ConfigDict")
            else:
                said = unknown_key(error, argv)
        # ml_collections wraps what went wrong in a report; the fault itself stands last.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        line = lines[-1] if lines else repr(error)
        beside = isinstance(error, OSError) and path not in line
        fail(said or ValueError(f"{path}: {line}" if beside else line))


def disk_fault(error: OSError) -> OSError | None:
    """What to say where a disk is full, over a quota or cannot be written; else None.

    The run ends with status `DISK_ERROR` and one line. What was saved before stays: the same
    command goes on from the last whole checkpoint once there is room.
    """
    if error.errno not in _DISK:
        return None
    where = f"{error.filename}: " if error.filename else ""
    mend = "make it writable" if error.errno in (errno.EROFS, errno.EIO) else "make room"
    return OSError(f"{where}{error.strerror}; {mend}, then start the same command again")


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """Ends the program with one line on stderr where a person has something to mend.

    A `ValueError` that this package raised is bad input (status `USAGE_ERROR`), as is a config
    without a key that this package reads. A disk that takes no more is `DISK_ERROR`. Everything
    else is a fault and keeps its traceback.
    """
    try:
        yield
    except ValueError as error:
        if not is_ours(error):
            raise
        fail(error)
    except AttributeError as error:
        said = missing_key(error)
        if said is None:
            raise
        fail(said)
    except OSError as error:
        full = disk_fault(error)
        if full is None:
            raise
        fail(full, DISK_ERROR)


def run(main: Callable[[ConfigDict, str], Any], config: ConfigDict, workdir: str) -> None:
    """Holds the config to the keys of the program, then calls ``main(config, workdir)``."""
    with one_line():
        if main.__name__ in sections.PROGRAMS:
            sections.check(main.__name__, config)
        main(config, workdir)


def run_flags(main: Callable[..., Any]) -> None:
    """Runs a program that takes flags of its own in place of a config.

    Every parameter of ``main`` is a flag: ``Annotated`` with its type and what --help says of it,
    required where it has no default.
    """
    parameters = inspect.signature(main).parameters
    required = [name for name, one in parameters.items() if one.default is one.empty]
    for name, parameter in parameters.items():
        if name in flags.FLAGS:  # --workdir is there already
            continue
        kind, said = typing.get_args(parameter.annotation)
        _DEFINE[kind](name, None if name in required else parameter.default, said)

    def start(argv: list[str]) -> None:
        if len(argv) > 1:
            fail(ValueError(f"unknown arguments: {' '.join(argv[1:])}; wanted flags --name=value"))
        missing = [f"--{name}" for name in required if not flags.FLAGS[name].value]
        if missing:
            fail(ValueError(f"{', '.join(missing)} missing; --help lists all flags"))
        for flag in (_CONFIG, _WORKDIR):
            if flag.value is not None and flag.name not in parameters:
                fail(ValueError(f"--{flag.name}: this program takes no config; --help lists flags"))
        set_up_logging()
        with one_line():
            join_job()
            main(**{name: flags.FLAGS[name].value for name in parameters})

    for name in (*parameters, *(flag.name for flag in _JOB)):
        _list_flag(name)
    app.run(start, flags_parser=parse)


def _list_flag(name: str) -> None:
    """--help lists the flags of the program that was started."""
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])


def run_program(main: Callable[[ConfigDict, str], Any]) -> None:
    """Parses the command line and runs ``main(config, workdir)`` as `run` does."""

    def start(argv: list[str]) -> None:
        if len(argv) > 1:
            fail(
                ValueError(
                    f"unknown arguments: {' '.join(argv[1:])}; wanted --config=FILE --workdir=DIR "
                    "and values as --config.key=value (with the equals sign)"
                )
            )
        set_up()
        with one_line():
            join_job()
        run(main, _CONFIG.value, _WORKDIR.value)

    for flag in (_CONFIG, _WORKDIR, *_JOB):
        _list_flag(flag.name)
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(start, flags_parser=parse)
