"""The program in which a model's code runs: it takes rights away from itself, then runs the code.

Started by `code_sandbox`, with one JSON object on stdin (`code_sandbox.Job`, the limits), a pipe on
which it says "ready" and the words of the checks that held, and a file that holds those words. It
imports nothing of the package.

In namespaces ("namespaces"): a root of its own in memory with Python and the system's programs in
it, read-only, and nothing else of the machine; an empty network; no sight of other processes; a
/tmp in memory for the code's own files; no capabilities; some calls of the kernel refused. With a
hook ("hook"): Python's own calls to sockets, other programs, other processes and files outside of
the folder raise. The hook stops code that means no harm; one that looks for a way around it finds
one.
"""

import ctypes
import json
import os
import resource
import struct
import sys
import tempfile
import types
from typing import Any

# What of the machine stands in the new root, where it exists: the system's programs and
# libraries, parts of the interpreter's folders, a few files and devices.
_SYSTEM = (
    "/usr", "/lib", "/lib32", "/lib64", "/libx32", "/bin", "/sbin", "/nix/store", "/gnu/store",
    "/etc/alternatives", "/etc/ld.so.cache", "/etc/localtime",
)  # fmt: skip
_PYTHON = ("bin", "lib", "lib64", "share", "pyvenv.cfg")
_DEVICES = ("null", "zero", "urandom", "random")
_LINKS = {"fd": "/proc/self/fd", "shm": "/tmp"}  # in /dev
_WORD = 32  # bytes of the word that says that a check held

_READ_ONLY, _NO_SETUID, _NO_DEVICES, _NO_PROGRAMS = 1, 2, 4, 8  # linux/mount.h
_BIND, _SUBTREE, _DETACH = 4096, 16384, 2
_RECURSIVE, _HERE = 0x8000, -100  # linux/fcntl.h
_MOUNT_SETATTR = 442  # the same number on every architecture
_NO_NEW_PRIVILEGES, _DROP_BOUNDING, _SET_SECCOMP, _FILTER = 38, 24, 22, 2  # linux/prctl.h
_CAPABILITY_VERSION = 0x20080522

# By machine: its number in linux/audit.h, that of `socket`, and those of the calls that are refused
# because they reach past the limits: shmget, semget, msgget, memfd_create, memfd_secret (memory
# of no process), add_key, request_key, keyctl (the user's keys), io_uring_setup (calls unseen).
_CALLS = {
    "x86_64": (0xC000003E, 41, (29, 64, 68, 319, 447, 248, 249, 250, 425)),
    "aarch64": (0xC00000B7, 198, (194, 190, 186, 279, 447, 217, 218, 219, 425)),
}
_FAMILIES = (1, 2, 10, 16)  # sockets that a network namespace holds: unix, inet, inet6, netlink
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06  # linux/bpf_common.h
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050001, 0x80000000  # linux/seccomp.h; 1 is EPERM
_FOREIGN = 0x40000000  # on x86-64, calls of another kind begin at this number

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
    """Leaves the machine's files for a root of its own, and gives all rights away."""
    libc = ctypes.CDLL(None, use_errno=True)
    build_root(libc, folder, file_bytes)
    with open(f"{folder}/proc/sys/user/max_user_namespaces", "w") as most:
        most.write("0")  # in a namespace within, the code would have capabilities again
    with open(f"{folder}/proc/self/oom_score_adj", "w") as score:
        score.write("1000")  # where the machine's memory ends all the same, this has to go
    with open("/proc/sys/kernel/cap_last_cap") as last:
        capabilities = range(int(last.read()) + 1)
    os.chdir(folder)
    # The new root over the old one, at the same place; what is then on top is the old one.
    _checked(libc.pivot_root(b".", b"."), "no new root")
    _checked(libc.umount2(b".", _DETACH), "the old root stays")
    os.chdir("/tmp")
    for path in ("/", "/proc"):
        _protect(libc, path, _READ_ONLY, below=0)  # /tmp stays as it is
    _checked(libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS")
    for capability in capabilities:
        _checked(libc.prctl(_DROP_BOUNDING, capability, 0, 0, 0), "PR_CAPBSET_DROP")
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    _checked(libc.capset(header, (ctypes.c_uint32 * 6)()), "capset")
    refuse_calls(libc)


def build_root(libc: Any, root: str, file_bytes: int) -> None:
    """Mounts a tree in memory on `root`: Python, the system's programs, /proc, /dev and a /tmp."""
    _mount(libc, "tmpfs", root, _NO_SETUID | _NO_DEVICES, "size=1m,mode=755")
    for name in ("tmp", "proc", "dev"):
        os.mkdir(f"{root}/{name}")
    # Before the rest: an interpreter may lie in /tmp.
    options = f"size={file_bytes},nr_inodes=1000,mode=1777"
    _mount(libc, "tmpfs", f"{root}/tmp", _NO_SETUID | _NO_DEVICES, options)
    _mount(libc, "proc", f"{root}/proc", _NO_SETUID | _NO_DEVICES | _NO_PROGRAMS, "")
    prefixes = (sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix)
    prefixes += tuple(os.path.realpath(prefix) for prefix in prefixes)
    parts = {os.path.join(prefix, part) for prefix in prefixes for part in _PYTHON}
    shown: list[str] = []
    for source in sorted({*_SYSTEM, *parts}):  # a folder before what lies in it
        inside = any(source.startswith(f"{folder}/") for folder in shown)
        if not inside and os.path.exists(source):
            _bind(libc, source, root)
            _protect(libc, root + source, _READ_ONLY | _NO_SETUID | _NO_DEVICES)
            shown.append(source)
    for device in _DEVICES:
        _bind(libc, f"/dev/{device}", root)
        _protect(libc, f"{root}/dev/{device}", _READ_ONLY | _NO_SETUID)  # it is the machine's node
    for name, target in _LINKS.items():
        os.symlink(target, f"{root}/dev/{name}")


def _mount(libc: Any, kind: str, target: str, flags: int, options: str) -> None:
    given = (kind.encode(), os.fsencode(target), kind.encode(), flags, options.encode())
    _checked(libc.mount(*given), f"no {kind} on {target}")


def _bind(libc: Any, source: str, root: str) -> None:
    """Shows a folder or a file of the machine at the same place under `root`."""
    target = root + source
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
    given = (os.fsencode(source), os.fsencode(target), None, _BIND | _SUBTREE, None)
    _checked(libc.mount(*given), f"{source} cannot be shown")


def _protect(libc: Any, path: str, attributes: int, *, below: int = _RECURSIVE) -> None:
    """Adds attributes to a mount and, unless `below` is 0, to those that stand in it."""
    given = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)
    size = ctypes.sizeof(given)
    result = libc.syscall(_MOUNT_SETATTR, _HERE, os.fsencode(path), below, given, size)
    _checked(result, f"{path} cannot be made read-only")


def refuse_calls(libc: Any) -> None:
    """From now on the kernel answers the calls of `_CALLS`, and sockets of other families than
    `_FAMILIES`, with EPERM; a call in the manner of another machine ends the process.

    The rules are a program for `struct seccomp_data`: the call's number at byte 0, the machine at
    4, the first argument at 16.
    """
    machine = os.uname().machine
    if machine not in _CALLS:
        raise OSError(f"no rules for the calls of {machine}; there are for {sorted(_CALLS)}")
    number, socket, refused = _CALLS[machine]
    # (what to do, with what, where to go if so, where to go if not); without a name: to the next
    steps = [
        (_LOAD, 4, None, None),
        (_EQUAL, number, None, "kill"),
        (_LOAD, 0, None, None),
        (_AT_LEAST, _FOREIGN, "refuse", None),
        *((_EQUAL, call, "refuse", None) for call in refused),
        (_EQUAL, socket, None, "allow"),
        (_LOAD, 16, None, None),
        *((_EQUAL, family, "allow", None) for family in _FAMILIES),
    ]
    ends = {"refuse": _REFUSE, "allow": _ALLOW, "kill": _KILL}
    places = {name: len(steps) + place for place, name in enumerate(ends)}
    rules = b"".join(
        struct.pack("HBBI", do, *(places[to] - at - 1 if to else 0 for to in (yes, no)), value)
        for at, (do, value, yes, no) in enumerate(steps)
    ) + b"".join(struct.pack("HBBI", _RETURN, 0, 0, end) for end in ends.values())
    kept = ctypes.create_string_buffer(rules, len(rules))
    program = ctypes.create_string_buffer(
        struct.pack("HP", len(rules) // 8, ctypes.addressof(kept))
    )
    _checked(libc.prctl(_SET_SECCOMP, _FILTER, program, 0, 0), "PR_SET_SECCOMP")


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


def set_limits(limits: dict[str, int], isolation: str) -> None:
    """CPU time, memory of a process, size of a file, open files; processes, in namespaces.

    Elsewhere the kernel counts the processes of the user, not of the program; and those of the
    machine's root it never counts. The memory and number of all together are watched outside.
    """
    kinds = [
        (resource.RLIMIT_CPU, limits["cpu_seconds"]),
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_FSIZE, limits["file_bytes"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ]
    if isolation == "namespaces":
        kinds.append((resource.RLIMIT_NPROC, limits["tasks"]))
    for kind, value in kinds:
        resource.setrlimit(kind, (value, value))


def run_job(job: dict[str, Any], words: int, pipe: int) -> None:
    """Runs the code and then each check in the code's names; writes the words of those that held.

    Without checks the code is a program of its own, run as ``__main__``. A check's word is read
    after the check: nothing that the code finds in memory or in frames before could say it.
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
        # By place, for the code may have made processes that read here too.
        os.write(pipe, os.pread(words, _WORD, number * _WORD) + b"\n")


def main(pipe: int, words: int) -> None:
    """Reads the job, closes the doors, runs it, and ends without asking the code."""
    job = json.loads(sys.stdin.buffer.read())
    folder, limits, isolation = job["folder"], job["limits"], job["isolation"]
    if isolation == "namespaces":
        close_namespaces(folder, limits["file_bytes"])
        folder = "/tmp"
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
    set_limits(limits, isolation)
    os.write(pipe, b"ready\n")
    if isolation == "hook":
        add_hook(folder)
    status = 1
    try:
        run_job(job, words, pipe)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.stdout.flush()
        os._exit(status & 0xFF)  # threads and exit handlers of the code do not run on


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
