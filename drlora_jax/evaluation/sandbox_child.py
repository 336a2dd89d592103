"""Builds the isolation of `sandbox` and runs one program in it. Started as a script, on Linux.

    harness ── launcher ─────────── supervisor ───────────── program
               new namespaces       process 1 inside:        its own interpreter, uid 65534,
                                    mounts, limits, verdict  no capabilities, nothing but fd 0 and 3

Uses only the standard library, without site-packages. Reads one JSON object from standard input
(`program`, `limits`, `nonce`) and writes one to standard output (`verdict`, `detail`). If anything
cannot be set up the verdict is `unavailable`; nothing is skipped.
"""

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import sys
import time

NOBODY = 65534
WORK = "/work"  # the program's directory
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
NAMESPACES = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
SYS_MOUNT_SETATTR = 442  # the same number on every architecture; Linux 5.12
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "riscv64": 41, "ppc64le": 203, "s390x": 217}
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 24, 38
DEVICES = ("null", "zero", "random", "urandom")
SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/nix/store", "/etc/ld.so.cache")

# Runs in the program's interpreter. The nonce proves that the last line was reached: an early exit
# with any exit code is a failure.
RUNNER = """
import os, sys
content = os.read(0, 1 << 20)
while part := os.read(0, 1 << 20):
    content += part
nonce, _, source = content.partition(b"\\n")
os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
out = os.dup(3); os.close(3)
report = b""
try:
    exec(compile(source.decode(), "program.py", "exec"), {"__name__": "__main__"})
except BaseException as error:
    report = type(error).__name__.encode() + b": " + str(error).encode("utf-8", "replace")[:300]
    os.write(out, b"raised " + report)
else:
    os.write(out, b"passed " + nonce)
os._exit(0)
"""

libc = ctypes.CDLL(None, use_errno=True)


class Unavailable(Exception):
    """Raised for a part of the isolation that this machine does not support."""


def call(what: str, result: int) -> None:
    if result != 0:
        raise Unavailable(f"{what}: {os.strerror(ctypes.get_errno())}")


def main() -> None:
    order = json.load(sys.stdin)
    try:
        enter_namespaces()
        child = os.fork()
    except (Unavailable, OSError) as error:
        answer("unavailable", str(error))
        return
    if child == 0:
        supervise(order)
    os.waitpid(child, 0)


def answer(verdict: str, detail: str = "") -> None:
    os.write(1, json.dumps({"verdict": verdict, "detail": detail}).encode() + b"\n")


def enter_namespaces() -> None:
    """Enters new namespaces. Root uses its own privileges and drops them later; other users acquire
    them in a user namespace.
    """
    uid, gid = os.geteuid(), os.getegid()
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if uid != 0:
        with open_directory("/proc") as proc:
            enter_user_namespace(proc, uid, gid)
    call("new namespaces", libc.unshare(NAMESPACES))


def enter_user_namespace(proc: int, uid: int, gid: int) -> None:
    """Enters a user namespace whose only user is nobody, so that exec loses every capability."""
    call("a new user namespace", libc.unshare(CLONE_NEWUSER))
    write_file(proc, "self/setgroups", "deny")
    write_file(proc, "self/uid_map", f"{NOBODY} {uid} 1")
    write_file(proc, "self/gid_map", f"{NOBODY} {gid} 1")


def write_file(directory: int, name: str, text: str) -> None:
    try:
        file = os.open(name, os.O_WRONLY | os.O_CLOEXEC, dir_fd=directory)
        os.write(file, text.encode())
        os.close(file)
    except OSError as error:
        raise Unavailable(f"writing {name}: {error.strerror}") from error


@contextlib.contextmanager
def open_directory(path: str):
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def supervise(order: dict) -> None:
    """Runs as process 1 of the new namespace: when it ends, the kernel kills everything inside."""
    try:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        proc = build_root(order["limits"])
        drop_rights(proc)
        answer(*run(order, proc))
    except (Unavailable, OSError) as error:
        answer("unavailable", str(error))
    finally:
        os._exit(0)


# ------------------------------------------------------------------------------------------- root


def build_root(limits: dict) -> int:
    """Builds a root with only the interpreter and system libraries, all read-only, and an empty
    directory in memory. Returns a directory descriptor of /proc, which the program never receives.
    """
    root = "/tmp" if os.path.isdir("/tmp") else "/mnt"
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    visible = [(path, os.path.realpath(path)) for path in system_paths()]
    links = {path: os.readlink(path) for path, _ in visible if os.path.islink(path)}
    # Opened before the new root hides the folder in which it is built.
    sources = {
        path: os.open(path, os.O_PATH | os.O_CLOEXEC) for path, _ in visible if path not in links
    }
    devices = {f"/dev/{name}": os.open(f"/dev/{name}", os.O_PATH) for name in DEVICES}
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,nr_inodes=4k,mode=755")
    for path, target in links.items():
        os.makedirs(os.path.dirname(root + path), exist_ok=True)
        os.symlink(target, root + path)
    for path, descriptor in sources.items():
        bind(descriptor, root + path, is_directory=os.path.isdir(f"/proc/self/fd/{descriptor}"))
        protect(root + path, MS_RDONLY | MS_NOSUID)
    for path, descriptor in devices.items():
        bind(descriptor, root + path, is_directory=False)
    for path in (WORK, "/proc", "/old"):
        os.makedirs(root + path)
    size = f"size={limits['disk_bytes']},nr_inodes=1k,mode=700"
    mount("tmpfs", root + WORK, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, size)
    os.chown(root + WORK, NOBODY, NOBODY)
    mount("proc", root + "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    return enter_root(root)


def enter_root(root: str) -> int:
    machine = os.uname().machine
    if machine not in SYS_PIVOT_ROOT:
        raise Unavailable(f"pivot_root: unknown on {machine}")
    os.chdir(root)
    call("pivot_root", libc.syscall(SYS_PIVOT_ROOT[machine], b".", b"old"))
    os.chdir("/")
    call("leaving the old root", libc.umount2(b"/old", MNT_DETACH))
    os.rmdir("/old")
    proc = os.open("/proc", os.O_RDONLY | os.O_CLOEXEC)
    call("hiding /proc", libc.umount2(b"/proc", MNT_DETACH))
    protect("/", MS_RDONLY, is_recursive=False)
    os.chdir(WORK)
    return proc


def system_paths() -> list[str]:
    """Returns the paths that an interpreter needs, none of which is inside another one."""
    wanted = [path for path in (*SYSTEM, sys.base_prefix) if os.path.lexists(path)]
    if os.path.realpath(sys.base_prefix) in ("/", os.path.expanduser("~")):
        raise Unavailable(f"the interpreter is installed directly in {sys.base_prefix}")
    real = sorted({path for path in wanted if not os.path.islink(path)})
    kept = [path for path in real if not any(path.startswith(other + "/") for other in real)]
    return kept + [path for path in wanted if os.path.islink(path) and path not in kept]


def bind(descriptor: int, target: str, *, is_directory: bool) -> None:
    if is_directory:
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o600))
    mount(f"/proc/self/fd/{descriptor}", target, None, MS_BIND | MS_REC)


def mount(source, target: str, kind, flags: int, data: str | None = None) -> None:
    encoded = [None if each is None else each.encode() for each in (source, target, kind, data)]
    source, target_bytes, kind, data = encoded
    flags = ctypes.c_ulong(flags)
    call(f"mount {target}", libc.mount(source, target_bytes, kind, flags, data))


def protect(path: str, attributes: int, *, is_recursive: bool = True) -> None:
    """Adds mount attributes to a mount and, by default, to all below it."""
    wanted = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)  # set, clear, propagation, user namespace
    flags = AT_RECURSIVE if is_recursive else 0
    result = libc.syscall(
        SYS_MOUNT_SETATTR, AT_FDCWD, path.encode(), flags, ctypes.byref(wanted), ctypes.c_size_t(32)
    )
    call(f"making {path} read-only", result)


def drop_rights(proc: int) -> None:
    """Changes from root to nobody, in a user namespace of its own, irreversibly."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)  # otherwise root keeps the files of /proc/self
        enter_user_namespace(proc, NOBODY, NOBODY)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # a change of user clears it
    # The creator of a namespace inside would have capabilities over it.
    write_file(proc, "sys/user/max_user_namespaces", "0")
    for capability in range(64):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    call("no new rights", libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)


# ---------------------------------------------------------------------------------------- program


def run(order: dict, proc: int) -> tuple[str, str]:
    """Starts the program and monitors time, memory and processes of everything inside."""
    limits, nonce = order["limits"], order["nonce"].encode()
    read_source, write_source = os.pipe()
    read_report, write_report = os.pipe()
    program = os.fork()
    if program == 0:
        start_program(limits, read_source, write_report)
    os.close(read_source)
    os.close(write_report)
    deadline = time.monotonic() + limits["wall_seconds"]
    source = memoryview(nonce + b"\n" + order["program"].encode())
    report, status = b"", None
    os.set_blocking(write_source, False)
    while status is None:
        source = feed(write_source, source)
        if select.select([read_report], [], [], 0.01)[0]:
            report = (report + os.read(read_report, 4096))[:4096]
        status = reap(program)
        if (excess := too_much(proc, limits, deadline)) and status is None:
            return excess
    while select.select([read_report], [], [], 0)[0] and (part := os.read(read_report, 4096)):
        report = (report + part)[:4096]
        if len(report) == 4096:
            break
    return judge(report, status, nonce)


def feed(descriptor: int, source: memoryview) -> memoryview:
    """Writes as much of the program as fits into the pipe; closes it at the end."""
    if not source.nbytes:
        return source
    try:
        source = source[os.write(descriptor, source) :]
    except BlockingIOError:
        return source
    except BrokenPipeError:
        source = source[:0]
    if not source.nbytes:
        os.close(descriptor)
    return source


def start_program(limits: dict, source: int, report: int) -> None:
    try:
        null = os.open("/dev/null", os.O_RDWR)
        for old, new in ((source, 0), (null, 1), (null, 2), (report, 3)):
            os.dup2(old, new)
        os.closerange(4, 65536)
        os.setsid()
        for name, value in (
            (resource.RLIMIT_CPU, limits["cpu_seconds"]),
            (resource.RLIMIT_AS, limits["memory_bytes"]),
            (resource.RLIMIT_FSIZE, limits["file_bytes"]),
            (resource.RLIMIT_NPROC, limits["processes"]),
            (resource.RLIMIT_NOFILE, 64),
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_MEMLOCK, 0),
        ):
            resource.setrlimit(name, (value, value))
        interpreter = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
        os.execve(interpreter, [interpreter, "-I", "-S", "-B", "-c", RUNNER], {})
    finally:
        os._exit(127)


def reap(program: int) -> int | None:
    """Returns the program's exit status once it has ended; also reaps its orphans."""
    while True:
        try:
            ended, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return 0
        if ended == program:
            return status
        if ended == 0:
            return None


def too_much(proc: int, limits: dict, deadline: float) -> tuple[str, str] | None:
    """Checks the limits for all processes together; those of `resource` apply to each process."""
    if time.monotonic() > deadline:
        return "timed out", f"after {limits['wall_seconds']} s"
    inside = [name for name in os.listdir(proc) if name.isdigit() and name != "1"]
    if len(inside) > limits["processes"]:
        return "limited", f"more than {limits['processes']} processes"
    pages = 0
    for name in inside:
        try:
            statm = os.open(f"{name}/statm", os.O_RDONLY, dir_fd=proc)
            pages += int(os.read(statm, 200).split()[1])
            os.close(statm)
        except (OSError, IndexError):
            continue  # has ended meanwhile
    if pages * resource.getpagesize() > limits["memory_bytes"]:
        return "limited", f"more than {limits['memory_bytes'] >> 20} MiB of memory"
    return None


def judge(report: bytes, status: int, nonce: bytes) -> tuple[str, str]:
    if report == b"passed " + nonce:
        return "passed", ""
    if report.startswith(b"raised "):
        return "failed", report[7:].partition(b"raised ")[0].decode("utf-8", "replace")
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number in (signal.SIGXCPU, signal.SIGKILL):
            return "timed out", "out of processor time, or killed"
        return "failed", f"ended by {signal.Signals(number).name}"
    return "failed", f"ended early, with exit code {os.waitstatus_to_exitcode(status)}"


if __name__ == "__main__":
    main()
