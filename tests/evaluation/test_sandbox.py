"""Programs that try to get out, to stay, or to take the machine: none does, and we go on."""

import os
import pathlib
import socket
import subprocess
import sys
import threading
import time

import pytest

from drlora_jax.errors import UserError
from drlora_jax.evaluation import sandbox as sandbox_lib
from drlora_jax.evaluation.sandbox import Outcome, Sandbox
from tests.support.isolation import LIMITS, isolated

# For programs that run into another limit, so that no load of the machine lets time end them first.
PATIENT = LIMITS._replace(cpu_seconds=60, wall_seconds=60)


@pytest.fixture(scope="module")
def sandbox():
    return Sandbox(LIMITS)


@pytest.fixture(scope="module")
def patient():
    return Sandbox(PATIENT)


@pytest.fixture
def outside(tmp_path):
    """A file that no program may read or change."""
    file = tmp_path / "secret.txt"
    file.write_text("secret")
    tmp_path.chmod(0o777)
    file.chmod(0o666)
    yield file
    assert file.read_text() == "secret" and os.listdir(tmp_path) == ["secret.txt"]


@isolated
def test_programs_run(sandbox):
    assert sandbox.run("import math, json, re\nassert math.gcd(4, 6) == 2") == Outcome("passed", "")
    assert sandbox.run("assert 1 == 2, 'no'") == Outcome("failed", "AssertionError: no")
    assert sandbox.run("def f(:").detail.startswith("SyntaxError")
    assert sandbox.run("open('a', 'w').write('b'); assert open('a').read() == 'b'").is_passed
    assert sandbox.run("import os; assert os.listdir('.') == []").is_passed  # nothing stays
    assert sandbox.run("x = '\ud800'").verdict == "failed"


# What each is: a program, and what must come of it. A program that finds a way out ends normally.
# Where no time limit is among the verdicts, the program has plenty of time.
HOSTILE = {
    "fork bomb": ("import os\nwhile True: os.fork()", {"failed", "timed out", "limited"}),
    "fork bomb that waits": (
        "import os, time\nfor _ in range(1000):\n    if os.fork() == 0: time.sleep(60)",
        {"failed", "limited"},
    ),
    "endless loop": ("while True: pass", {"timed out"}),
    "endless sleep": ("import time; time.sleep(600)", {"timed out"}),
    "ignores signals": (
        "import signal\nfor s in (1, 2, 3, 15, 24): signal.signal(s, signal.SIG_IGN)\n"
        "while True: pass",
        {"timed out"},
    ),
    "endless print": ("while True: print('x' * 1000)", {"timed out"}),
    "memory bomb": (
        "x = []\nwhile True: x.append(bytearray(10_000_000))",
        {"failed", "limited"},
    ),
    "memory bomb of many": (
        "import os, time\nfor _ in range(8): os.fork()\nx = bytearray(100_000_000)\ntime.sleep(60)",
        {"failed", "limited"},
    ),
    "large file": ("open('a', 'wb').write(b'x' * 10_000_000)", {"failed"}),
    "many files": (
        "for i in range(100): open(str(i), 'wb').write(b'x' * 900_000)",
        {"failed"},
    ),
    "network": ("import socket; socket.create_connection(('127.0.0.1', PORT), 1)", {"failed"}),
    "datagrams": (
        "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM)"
        ".sendto(b'x', ('127.0.0.1', PORT))",
        {"failed"},
    ),
    "reads a file": ("open(SECRET).read()", {"failed"}),
    "reads another root": ("open('/proc/1/root' + SECRET).read()", {"failed"}),
    "writes a file": ("open(SECRET, 'w').write('changed')", {"failed"}),
    "writes beside it": ("import os; os.mkdir(os.path.dirname(SECRET) + '/new')", {"failed"}),
    "writes to the library": (
        "import os; open(os.path.join(os.path.dirname(os.__file__), 'new.py'), 'w')",
        {"failed"},
    ),
    "reads the environment": ("import os; os.environ['HOME']", {"failed"}),
    "kills the harness": (
        "import os; os.kill(PARENT, 9); assert os.getpid() == PARENT",
        {"failed"},
    ),
    "kills the supervisor": (
        "import os; os.kill(1, 9); raise SystemExit('not killed')",
        {"failed"},
    ),
    "kills everyone": (
        "import os\ntry: os.kill(-1, 9)\nexcept ProcessLookupError: raise SystemExit('no one')",
        {"failed"},
    ),
    "raw calls": (
        "import ctypes\nlibc = ctypes.CDLL(None)\n"
        "assert 0 in (libc.unshare(0x10000000), libc.chroot(b'/'), libc.setuid(0),"
        " libc.mount(b'none', b'/work', b'tmpfs', 0, None), libc.umount2(b'/work', 2))",
        {"failed"},
    ),
    "traces its parent": (
        "import ctypes\nassert ctypes.CDLL(None).ptrace(16, 1, None, None) == 0",
        {"failed"},
    ),
    "crashes": ("import ctypes; ctypes.string_at(0)", {"failed"}),
    "leaves early": ("import os; os._exit(0)", {"failed"}),
    "leaves politely": ("raise SystemExit(0)", {"failed"}),
    "forges a report": (
        "import os\nfor d in range(3, 20):\n    os.write(d, b'passed ')",
        {"failed"},
    ),
    "exhausts the stack": (
        "import sys; sys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
        {"failed", "timed out", "limited"},
    ),
    "raises a limit": (
        "import resource; resource.setrlimit(resource.RLIMIT_CPU, (100, 100))",
        {"failed"},
    ),
    "makes a device": ("import os; os.mknod('sda', 0o60600, os.makedev(8, 0))", {"failed"}),
}


@isolated
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs(name, sandbox, patient, outside):
    program, verdicts = HOSTILE[name]
    chosen = sandbox if "timed out" in verdicts else patient
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(1)
        server.settimeout(0)
        facts = (
            f"PORT, SECRET, PARENT = {server.getsockname()[1]}, {str(outside)!r}, {os.getpid()}\n"
        )
        outcome = chosen.run(facts + program)
        assert outcome.verdict in verdicts, outcome
        # The supervisor has ended it, not we who would have waited longer for a lost supervisor.
        ends = (f"after {LIMITS.wall_seconds} s", "out of processor time, or killed")
        assert outcome.verdict != "timed out" or outcome.detail in ends, outcome
        with pytest.raises(OSError):
            server.accept()


def _inside() -> list[str]:
    """Command lines of programs in the sandbox, seen from outside."""
    found = []
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if b"left-behind-by-the-test" in line:
            found.append(folder.name)
    return found


@isolated
def test_nothing_is_left_running(sandbox):
    program = (
        "import os, sys, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    python = os.path.realpath(sys.executable) if sys.executable else '/usr/bin/sleep'\n"
        "    wait = 'import time; time.sleep(60)'\n"
        "    os.execv(python, [python, '-c', wait, 'left-behind-by-the-test'])\n"
        "time.sleep(0.3)\n"
    )
    seen = []
    thread = threading.Thread(target=lambda: seen.append(sandbox.run(program)))
    thread.start()
    while thread.is_alive():
        seen += _inside()
        time.sleep(0.02)
    thread.join()
    assert Outcome("passed", "") in seen and len(seen) > 1  # it was there
    assert _inside() == []  # and is gone


@isolated
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_user_without_rights_gets_the_same_walls(tmp_path):
    """The child is started as another user, by an interpreter that everyone may run."""
    python = "/usr/bin/python3"
    if not os.path.exists(python):
        pytest.skip("no interpreter that other users can read")
    child = tmp_path / "child.py"
    child.write_text(sandbox_lib._CHILD.read_text())
    order = {"program": "import os\nassert os.getuid() == 65534\nwhile True: os.fork()"}
    order |= {"nonce": "n", "limits": LIMITS._asdict()}
    found = subprocess.run(
        [python, "-I", "-S", "-"],
        input=f"import io, sys\nsys.stdin = io.StringIO({sandbox_lib.json.dumps(order)!r})\n"
        + child.read_text(),
        capture_output=True,
        text=True,
        user=65533,
        group=65533,
        extra_groups=[],
        timeout=30,
        cwd="/",
    )
    assert '"verdict": "failed"' in found.stdout and "BlockingIOError" in found.stdout, found


def test_where_walls_are_missing_nothing_runs(monkeypatch, tmp_path):
    """Whatever the reason: no namespaces, another system, a wall that the probe finds open."""
    ran = []
    monkeypatch.setattr(
        sandbox_lib, "_run", lambda program, limits: ran.append(program) or Outcome(*REFUSAL)
    )
    REFUSAL = ("unavailable", "new namespaces: Operation not permitted")
    with pytest.raises(UserError, match="new namespaces: Operation not permitted"):
        Sandbox(LIMITS)
    REFUSAL = ("failed", "AssertionError: there is a network")
    with pytest.raises(UserError, match="there is a network"):
        Sandbox(LIMITS)
    assert len(ran) == 2
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(UserError, match="it is not Linux"):
        Sandbox(LIMITS)
    assert len(ran) == 2


@isolated
@pytest.mark.parametrize(
    ("wall", "missing"),
    [
        ("CLONE_NEWPID | CLONE_NEWNET", "CLONE_NEWPID"),
        ('write_file(proc, "sys/user/max_user_namespaces", "0")', "pass"),
        ('(resource.RLIMIT_NPROC, limits["processes"]),', ""),
        ("protect(root + path, MS_RDONLY | MS_NOSUID)", "pass"),
    ],
)
def test_the_probe_finds_a_missing_wall(wall, missing, monkeypatch, tmp_path):
    source = sandbox_lib._CHILD.read_text()
    assert source.count(wall) == 1
    child = tmp_path / "child.py"
    child.write_text(source.replace(wall, missing))
    monkeypatch.setattr(sandbox_lib, "_CHILD", child)
    with pytest.raises(UserError, match="does not provide"):
        Sandbox(LIMITS)
