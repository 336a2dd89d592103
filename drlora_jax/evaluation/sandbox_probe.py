"""Runs inside the sandbox after `FACTS = {...}`: raises at the first barrier that is missing."""

import ctypes
import os
import resource
import socket

FACTS = globals()["FACTS"]


def refused(action, *errors):
    try:
        action()
    except errors:
        return True
    return False


def require(ok, what):
    if not ok:
        raise AssertionError(what)


def write(path):
    with open(path, "w") as file:
        file.write("out")


def connect():
    socket.create_connection(("127.0.0.1", FACTS["port"]), timeout=1)


libc = ctypes.CDLL(None, use_errno=True)
limits = FACTS["limits"]
require(os.getuid() == os.geteuid() == 65534, "the program is another user than nobody")
require(os.environ.keys() <= {"LC_CTYPE"}, "the environment is not empty")
require(os.getcwd() == "/work" and os.listdir(".") == [], "the directory is not a new one")
require(refused(connect, OSError), "there is a network")
require([name for _, name in socket.if_nameindex() if name != "lo"] == [], "there are interfaces")
require(not os.path.exists(FACTS["secret"]), "files of others can be seen")
require(
    FACTS["home"] == "/"
    or refused(lambda: os.listdir(FACTS["home"]), OSError)
    or len(os.listdir(FACTS["home"])) <= 1,
    "the home directory can be read",
)
for path in ("/out", "/usr/out", "/dev/out", "/tmp/out", "/etc/out"):
    require(refused(lambda path=path: write(path), OSError), f"{path} can be written")
# Read from the mount, since the program may own a file.
for path in ("/", "/usr", os.path.dirname(os.__file__)):
    is_read_only = os.statvfs(path).f_flag & os.ST_RDONLY if os.path.exists(path) else True
    require(is_read_only, f"{path} is not read-only")
write("/work/in")
require(os.getppid() == 1, "the program has another parent than the supervisor")
require(refused(lambda: os.kill(-1, 0), ProcessLookupError), "other processes can be reached")
require(not os.path.exists("/proc/self"), "there is a /proc")
require(libc.unshare(0x10000000 | 0x00020000) != 0, "new mounts can be made")
require(libc.mount(b"tmpfs", b"/work", b"tmpfs", 0, None) != 0, "mounts can be made")
require(refused(lambda: os.setuid(0), OSError), "the program can become root")
for name, value in (
    (resource.RLIMIT_CPU, limits["cpu_seconds"]),
    (resource.RLIMIT_AS, limits["memory_bytes"]),
    (resource.RLIMIT_FSIZE, limits["file_bytes"]),
    (resource.RLIMIT_NPROC, limits["processes"]),
):
    require(resource.getrlimit(name) == (value, value), "a limit is not set")
require(refused(lambda: bytearray(2 * limits["memory_bytes"]), MemoryError), "memory has no limit")
