"""What holds code that means harm or only goes wrong.

Where this machine does not let us make namespaces the tests run with the hook alone.
"""

import os
import pathlib
import socket
import sys
import time

import pytest

from rlhf_jax.rewards import code_sandbox
from rlhf_jax.rewards.code_sandbox import Job, Limits, namespaces_work, run

AVAILABLE = [*(() if namespaces_work() else ("namespaces",)), "hook"]
in_namespaces = pytest.mark.skipif(
    "namespaces" not in AVAILABLE, reason="no namespaces on this machine"
)
LIMITS = Limits(cpu_seconds=1, wall_seconds=30.0, memory_mb=256)


@pytest.mark.parametrize("isolation", AVAILABLE)
def test_a_sandbox_that_cannot_be_set_up_is_an_error_and_no_zero(isolation, monkeypatch, tmp_path):
    broken = tmp_path / "child.py"
    broken.write_text("raise SystemExit('no')")
    monkeypatch.setattr(code_sandbox, "PROGRAM", broken)
    with pytest.raises(RuntimeError, match=r"no process for code could be set up.*no'"):
        run(Job("x = 1", ("assert x",)), LIMITS, isolation=isolation)


NO_PASS = {
    "endless": "while True:\n    pass",
    "memory": "x = bytearray(10**9)",
    "a file": "open('big', 'wb').write(bytes(10**8))",
    "leaves before the checks": "import os\nos._exit(0)",
    "leaves in a check": "def held():\n    raise SystemExit(0)",
    "recursion": "def held():\n    return held()",
    "evil names": "held = __import__('sys').exit",
    "the network": "import socket\nsocket.create_connection(('1.1.1.1', 53), 1)",
    "names": "import socket\nsocket.getaddrinfo('example.org', 80)",
    "tells": "import os\nfor pipe in range(3, 20):\n    try:\n        os.write(pipe, b'0\\n')\n"
    "    except OSError:\n        pass\ndef held():\n    return False",
    "a caller's names": "import os, sys\nsys._getframe(1).f_locals['say']('0')\nos._exit(0)",
    "all names and objects": """
import gc, os, sys
def held():
    frame, found = sys._getframe(), []
    while frame:
        found += [*frame.f_locals.values(), *frame.f_globals.values()]
        frame = frame.f_back
    found += gc.get_objects()
    texts = [one for one in found if isinstance(one, str | bytes) and len(one) < 200]
    for one in found:
        if isinstance(one, dict):
            texts += [text for text in one.values() if isinstance(text, str) and len(text) < 200]
        if callable(one) and getattr(one, "__name__", "") == "say":
            one("0")
    for text in texts:
        text = text if isinstance(text, bytes) else text.encode(errors="replace")
        os.write(PIPE, text + b"\\n" + text + b" 0\\n")
    return False
PIPE = max(fd for fd in range(20) if os.path.exists(f"/proc/self/fd/{fd}") and
           os.readlink(f"/proc/self/fd/{fd}").startswith("pipe"))
""",
}


@pytest.mark.parametrize("isolation", AVAILABLE)
@pytest.mark.parametrize("name", NO_PASS)
def test_code_that_fails_or_means_harm_passes_nothing(name, isolation):
    job = Job(NO_PASS[name], ("assert held() is True",))
    assert run(job, LIMITS, isolation=isolation).held == frozenset()


@pytest.mark.parametrize("isolation", AVAILABLE)
def test_files_of_the_machine_stay_as_they_are(isolation, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("here")
    for harm in (f"os.remove({str(victim)!r})", f"open({str(victim)!r}, 'w').write('gone')",
                 f"open({str(tmp_path / 'new')!r}, 'w')", f"os.mkdir({str(tmp_path / 'new')!r})",
                 f"import shutil; shutil.rmtree({str(tmp_path)!r})"):  # fmt: skip
        assert not run(Job(f"import os\n{harm}", ("pass",)), LIMITS, isolation=isolation).held
    assert [path.name for path in tmp_path.iterdir()] == ["victim"]
    assert victim.read_text() == "here"


@pytest.mark.parametrize("isolation", AVAILABLE)
def test_code_has_a_folder_of_its_own_for_a_while(isolation):
    name = f"a_{os.getpid()}"
    code = (
        "import os, tempfile\nopen('b', 'w')\nos.remove('b')\n"
        f"assert not os.path.exists({name!r})\n"
        f"open({name!r}, 'w').write('b')\nassert open({name!r}).read() == 'b'\n"
        f"tempfile.TemporaryFile().write(b'c')\nprint(os.path.abspath({name!r}))"
    )
    for _ in range(2):
        outcome = run(Job(code), LIMITS, isolation=isolation)
        assert (outcome.end, outcome.status) == ("ended", 0)
        assert not pathlib.Path(outcome.stdout.strip()).exists()


@pytest.mark.parametrize("isolation", AVAILABLE)
def test_secrets_of_the_environment_are_not_there(isolation, monkeypatch):
    monkeypatch.setenv("A_SECRET", "hunter2")
    outcome = run(Job("import os\nprint(dict(os.environ))"), LIMITS, isolation=isolation)
    assert "PATH" in outcome.stdout and "hunter2" not in outcome.stdout


@pytest.mark.parametrize("isolation", AVAILABLE)
def test_output_and_waiting_have_limits(isolation):
    limits = LIMITS._replace(output_bytes=1000, wall_seconds=1.0)
    outcome = run(Job("while True:\n    print('x' * 100)"), limits, isolation=isolation)
    assert outcome.end == "output" and len(outcome.stdout) < 1000 + (1 << 16) + 1
    start = time.monotonic()
    outcome = run(Job("import time\ntime.sleep(1000)"), limits, isolation=isolation)
    assert outcome.end == "wall" and time.monotonic() - start < 100


def commands() -> list[str]:
    """Every command line that runs on this machine now."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_text())
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while we looked
    return found


@in_namespaces
def test_processes_that_leave_the_group_die_too():
    marker = f"left_behind_{os.getpid()}"
    left = f"import os, sys, time; os.write(int(sys.argv[1]), b'1'); time.sleep(999) # {marker}"
    code = f"""
import os
reader, writer = os.pipe()
os.set_inheritable(writer, True)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execv({sys.executable!r}, ['python', '-c', {left!r}, str(writer)])
assert os.read(reader, 1) == b"1"  # it runs: the code may end
"""
    assert run(Job(code, ("pass",)), LIMITS, isolation="namespaces").held == {0}
    assert any("pytest" in command for command in commands())
    deadline = time.monotonic() + 30  # for the kernel to end what it was told to end
    while any(marker in command for command in commands()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@in_namespaces
def test_the_doors_cannot_be_opened_from_within():
    code = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
writable = 4096 | 32  # MS_BIND | MS_REMOUNT, without MS_RDONLY
print(libc.mount(b"none", b"/", None, writable, None))
print(libc.unshare(0x10000000 | 0x20000))  # a user namespace within, with its own capabilities
print(libc.mount(b"none", b"/", None, writable, None))
try:
    open("/written", "w")
except OSError as error:
    print(error.strerror)
"""
    outcome = run(Job(code), LIMITS, isolation="namespaces")
    assert outcome.stdout.splitlines() == ["-1", "-1", "-1", "Read-only file system"]


@in_namespaces
def test_nothing_of_the_machine_can_be_talked_to(tmp_path):
    """Sockets and pipes with a place in the file system, and the files of the user."""
    path, pipe, file = tmp_path / "socket", tmp_path / "pipe", tmp_path / "file"
    file.write_text("secret")
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(path))  # a name has at most 107 letters
        listener.listen()
        listener.setblocking(False)
        code = f"""
import os, socket
for harm in (lambda: socket.socket(socket.AF_UNIX).connect({str(path)!r}),
             lambda: os.write(os.open({str(pipe)!r}, os.O_WRONLY | os.O_NONBLOCK), b"out"),
             lambda: print(open({str(file)!r}).read()),
             lambda: print(open({__file__!r}).read())):
    try:
        print(harm())
    except FileNotFoundError:
        print("not there")
"""
        outcome = run(Job(code), LIMITS, isolation="namespaces")
        assert outcome.stdout.splitlines() == ["not there"] * 4
        with pytest.raises(BlockingIOError):
            listener.accept()
    assert os.read(reader, 9) == b""
    os.close(reader)


@in_namespaces
def test_what_of_the_machine_is_there():
    """No devices but four, whose nodes stay as they are; no folders but those of programs."""
    code = """
import os, stat
def kind(path):
    mode = os.lstat(path).st_mode
    return stat.S_ISCHR(mode) or stat.S_ISBLK(mode) or stat.S_ISSOCK(mode) or stat.S_ISFIFO(mode)
for top in ("/dev", "/tmp", "/etc"):
    for folder, _, files in os.walk(top):
        print(*(f"{folder}/{name}" for name in sorted(files) if kind(f"{folder}/{name}")))
print(*sorted(set(os.listdir("/")) & {"boot", "home", "media", "mnt", "run", "srv", "sys", "var"}))
with open("/dev/null", "wb") as null, open("/dev/urandom", "rb") as random:
    print(null.write(random.read(3)))
try:
    os.chmod("/dev/null", 0)
except OSError as error:
    print(error.strerror)
"""
    outcome = run(Job(code), LIMITS, isolation="namespaces")
    lines = [line for line in outcome.stdout.splitlines() if line]
    devices = "/dev/null /dev/random /dev/urandom /dev/zero"
    interpreter = f"{sys.prefix} {sys.base_prefix}".replace("/", " ").split()
    assert lines[0] == devices and lines[-2:] == ["3", "Read-only file system"]
    assert set(" ".join(lines[1:-2]).split()) <= set(interpreter)


@in_namespaces
def test_python_finds_what_it_needs():
    code = """
import multiprocessing, subprocess, sys
import numpy
def double(number):
    return 2 * number
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.map(double, [1, 2]) == [2, 4]
assert subprocess.check_output([sys.executable, "-c", "print(1)"]) == b"1\\n"
open("/tmp/new", "w").write("x")
print(numpy.ones(2).sum())
"""
    outcome = run(Job(code), Limits(wall_seconds=60.0), isolation="namespaces")
    assert (outcome.stdout, outcome.end, outcome.status) == ("2.0\n", "ended", 0)


# Each process says that it holds its memory, and holds it until all are stopped: what is looked at
# is there however busy the machine is.
FORKS = """
import os, time
shared = bytearray(b"1" * (SHARED << 20))
reader, writer = os.pipe()
for _ in range(PROCESSES):
    if os.fork() == 0:
        own = bytearray(b"1" * (OWN << 20))
        os.write(writer, b"1")
        time.sleep(999)
for _ in range(PROCESSES):
    os.read(reader, 1)
print("made", flush=True)
time.sleep(STAY)
os._exit(0)
"""


@in_namespaces
@pytest.mark.parametrize(
    ("own", "shared", "stay", "end"),
    [(100, 0, 999, "memory"), (0, 100, 0.5, "ended"), (0, 0, 0.5, "ended")],
)
def test_memory_of_all_processes_has_a_limit_together(own, shared, stay, end):
    """What they share counts once: five processes of 100 MB are not 500."""
    code = f"OWN, SHARED, PROCESSES, STAY = {own}, {shared}, 5, {stay}\n{FORKS}"
    outcome = run(Job(code), LIMITS, isolation="namespaces")
    assert outcome.end == end
    assert end != "ended" or (outcome.stdout, outcome.status) == ("made\n", 0)


@in_namespaces
def test_the_number_of_processes_has_a_limit():
    """The kernel's, or for the machine's root, whom it does not count, ours."""
    code = f"""
OWN, SHARED, PROCESSES, STAY = 0, 0, 400, 999
try:
    exec({FORKS!r})
except BlockingIOError:
    print("no more")
"""
    outcome = run(Job(code), LIMITS, isolation="namespaces")
    assert outcome.end == "tasks" or outcome.stdout == "no more\n"


@in_namespaces
def test_calls_that_reach_past_the_limits_are_refused():
    code = """
import ctypes, os, socket
libc = ctypes.CDLL(None, use_errno=True)
for refused in (lambda: os.memfd_create("held"), lambda: socket.socket(40, socket.SOCK_STREAM)):
    try:
        print(refused())
    except PermissionError:
        print("refused")
for call in (libc.shmget, libc.msgget, libc.semget):
    print(call(0, 1, 0o600))
socket.socketpair(), socket.socket()
print("others are not")
"""
    outcome = run(Job(code), LIMITS, isolation="namespaces")
    assert outcome.stdout.split() == ["refused"] * 2 + ["-1"] * 3 + ["others", "are", "not"]
