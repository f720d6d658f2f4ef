"""The program in which a model's code runs: it takes rights away from itself, then runs the code.

Started by `code_sandbox`, with one JSON object on stdin (`code_sandbox.Job`, the limits, a secret
word) and a pipe on which it says, behind the word, "ready" and which checks held. It imports
nothing of the package.

In namespaces ("namespaces"): no network but an empty one, no sight of other processes, every file
of the machine read-only, a folder in memory for the code's own files, no capabilities. With a hook
("hook"): Python's own calls to sockets, other programs, other processes and files outside of the
folder raise. The hook stops code that means no harm; one that looks for a way around it finds one.
"""

import ctypes
import json
import os
import resource
import sys
import tempfile
import types
from collections.abc import Callable
from typing import Any

_READ_ONLY, _RECURSIVE, _HERE = 1, 0x8000, -100  # linux/mount.h, linux/fcntl.h
_MOUNT_SETATTR = 442  # the same number on every architecture
_NO_NEW_PRIVILEGES, _DROP_BOUNDING = 38, 24  # linux/prctl.h
_CAPABILITY_VERSION = 0x20080522
_FORBIDDEN = (
    "socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork",
    "os.kill", "os.chmod", "os.chown", "os.link", "os.symlink", "pty.", "webbrowser.", "ftplib.",
    "urllib.", "smtplib.", "http.", "os.setxattr", "os.truncate", "signal.pthread_kill",
)  # fmt: skip
_PATHS = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "shutil.", "os.utime")


def _checked(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def close_namespaces(folder: str, file_bytes: int) -> None:
    """Makes every mount read-only, puts an empty one in memory on `folder`, drops capabilities."""
    libc = ctypes.CDLL(None, use_errno=True)
    attributes = (ctypes.c_uint64 * 4)(_READ_ONLY, 0, 0, 0)
    read_only = libc.syscall(
        _MOUNT_SETATTR, _HERE, b"/", _RECURSIVE, attributes, ctypes.sizeof(attributes)
    )
    _checked(read_only, "mounts cannot be made read-only")
    options = f"size={file_bytes},nr_inodes=1000,mode=700".encode()
    _checked(libc.mount(b"tmpfs", folder.encode(), b"tmpfs", 0, options), "no tmpfs")
    os.chdir(folder)
    _checked(libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS")
    with open("/proc/sys/kernel/cap_last_cap") as last:
        for capability in range(int(last.read()) + 1):
            _checked(libc.prctl(_DROP_BOUNDING, capability, 0, 0, 0), "PR_CAPBSET_DROP")
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    _checked(libc.capset(header, (ctypes.c_uint32 * 6)()), "capset")


def add_hook(folder: str) -> None:
    """Lets Python's own calls to the outside raise PermissionError, from now on."""
    inside = os.path.realpath(folder) + os.sep

    def is_inside(path: Any) -> bool:
        if isinstance(path, int):
            return True  # it is open already
        return f"{os.path.realpath(os.fsdecode(path))}{os.sep}".startswith(inside)

    def hook(event: str, args: tuple) -> None:
        if event.startswith(_FORBIDDEN):
            raise PermissionError(f"{event} is not allowed here")
        paths = ()
        if event == "open":
            path, _, flags = args
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            paths = (path,) if writes and path != os.devnull else ()
        elif event.startswith(_PATHS):
            paths = [path for path in args if isinstance(path, str | bytes | os.PathLike)]
        if not all(is_inside(path) for path in paths):
            raise PermissionError(f"{event} of {args[0]!r} is not allowed here")

    sys.addaudithook(hook)


def set_limits(limits: dict[str, int]) -> None:
    """CPU time, memory of a process, size of a file, open files.

    There is no limit on processes: the kernel counts them per user, not per program. The limit
    on the wall, outside, ends them all.
    """
    for kind, value in (
        (resource.RLIMIT_CPU, limits["cpu_seconds"]),
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_FSIZE, limits["file_bytes"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (value, value))


def run_job(job: dict[str, Any], say: Callable[[str], None]) -> None:
    """Runs the code and then each check in the code's names; says the numbers of those that held.

    Without checks the code is a program of its own, run as ``__main__``.
    """
    name = "candidate" if job["checks"] else "__main__"
    module = types.ModuleType(name)
    sys.modules[name] = module  # where dataclasses and pickle look
    sys.argv = [name]
    exec(compile(job["code"], f"<{name}>", "exec"), module.__dict__)
    for number, check in enumerate(job["checks"]):
        try:
            exec(compile(check, f"<check {number}>", "exec"), module.__dict__)
        except (Exception, SystemExit):
            # Whatever the code does instead of passing the check, the check is not held.
            continue
        say(str(number))


def main(pipe: int) -> None:
    """Reads the job, closes the doors, runs it, and ends without asking the code."""
    job = json.loads(sys.stdin.buffer.read())
    word, folder, limits = job["word"], job["folder"], job["limits"]

    def say(what: str) -> None:
        os.write(pipe, f"{word} {what}\n".encode())

    if job["isolation"] == "namespaces":
        close_namespaces(folder, limits["file_bytes"])
    os.chdir(folder)
    with tempfile.TemporaryFile(dir=folder) as given:
        given.write(job["stdin"].encode())
        given.seek(0)
        os.dup2(given.fileno(), 0)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115, the old one is at its end
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    if job["checks"]:
        os.dup2(nowhere, 1)
    set_limits(limits)
    say("ready")
    if job["isolation"] == "hook":
        add_hook(folder)
    status = 1
    try:
        run_job(job, say)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.stdout.flush()
        os._exit(status & 0xFF)  # threads and exit handlers of the code do not run on


if __name__ == "__main__":
    main(int(sys.argv[1]))
