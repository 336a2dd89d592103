"""`--out` may be a link, a mount or the current directory, and nothing is lost on the way."""

import errno
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from drlora_jax.errors import RunError, UserError
from drlora_jax.system import output_dir
from drlora_jax.system.output_dir import check_out, check_space, new_directory

FILES = {"config.json": "{}", "model.safetensors": "weights", "templates/tool.jinja": "{{ x }}"}


def fill(out: pathlib.Path) -> None:
    """What an export does."""
    with new_directory(out) as draft:
        for name, text in FILES.items():
            (draft / name).parent.mkdir(exist_ok=True)
            (draft / name).write_text(text)


def content(folder: pathlib.Path) -> dict[str, str]:
    return {
        file.relative_to(folder).as_posix(): file.read_text()
        for file in folder.rglob("*")
        if file.is_file()
    }


def dead_process() -> int:
    ended = subprocess.Popen([sys.executable, "-S", "-c", ""])
    ended.wait()
    return ended.pid


# ---------------------------------------------------------------------------------------------
# kinds of places


def new(folder):
    return "new", "new"


def nested(folder):
    return "a/b/new", "a/b/new"


def long_name(folder):
    return "n" * 250, "n" * 250


def empty(folder):
    (folder / "empty").mkdir()
    return "empty", "empty"


def link(folder):
    (folder / "real").mkdir()
    (folder / "link").symlink_to("real")
    return "link", "real"


def link_with_slash(folder):
    return f"{link(folder)[0]}/", "real"


def linked_parent(folder):
    link(folder)
    return "link/new", "real/new"


def linked_parent_and_empty(folder):
    link(folder)
    (folder / "real" / "sub").mkdir()
    return "link/sub", "real/sub"


def current(folder):
    return ".", "."


def parent_of_link(folder):
    (folder / "deep" / "real").mkdir(parents=True)
    (folder / "link").symlink_to("deep/real")
    return "link/../new", "deep/new"


PLACES = [
    *(new, nested, long_name, empty, link, link_with_slash, linked_parent),
    *(linked_parent_and_empty, current, parent_of_link),
]


@pytest.mark.parametrize("make", PLACES)
def test_files_arrive(tmp_path, monkeypatch, make):
    monkeypatch.chdir(tmp_path)
    path, real = make(tmp_path)
    links = {file: file.readlink() for file in tmp_path.iterdir() if file.is_symlink()}
    fill(check_out(path))
    assert content(tmp_path / real) == FILES
    assert {file: file.readlink() for file in links} == links
    assert not [file for file in tmp_path.rglob("*") if "partial" in file.name]


@pytest.mark.parametrize("make", PLACES)
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, ValueError])
def test_a_failure_leaves_everything_as_it_was(tmp_path, monkeypatch, make, error):
    monkeypatch.chdir(tmp_path)
    path, _ = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RunError if error is OSError else error):
        with new_directory(check_out(path)) as draft:
            (draft / "model.safetensors").write_text("half")
            raise error("stopped")
    assert sorted(tmp_path.rglob("*")) == before


def can_mount() -> bool:
    if not shutil.which("unshare"):
        return False
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/tmp"]
    return subprocess.run(command, capture_output=True).returncode == 0


IN_A_MOUNT = """
import pathlib, sys
from drlora_jax.system.output_dir import check_out, new_directory
with new_directory(check_out(sys.argv[1])) as draft:
    (draft / "config.json").write_text("{}")
print([file.name for file in pathlib.Path(sys.argv[1]).iterdir()])
"""
MOUNTED = ("mount", "mount/new", "mount/sub", "link") if can_mount() else ()


@pytest.mark.parametrize("path", MOUNTED)
def test_a_mounted_file_system(tmp_path, path):
    (tmp_path / "mount").mkdir()
    (tmp_path / "link").symlink_to("mount")
    commands = ["mount -t tmpfs none mount", 'exec "$1" -c "$2" "$3"']
    if path == "mount/sub":
        commands.insert(1, "mkdir mount/sub")
    arguments = [sys.executable, IN_A_MOUNT, path]
    result = subprocess.run(
        ["unshare", "-rm", "sh", "-c", " && ".join(commands), "sh", *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    assert result.stdout == "['config.json']\n", result.stderr


@pytest.mark.parametrize("path", ["mount", "mount/new"])
def test_nothing_is_moved_across_or_onto_a_mount_point(tmp_path, monkeypatch, path):
    """The rule behind it, also where this user may not mount."""
    mount = tmp_path / "mount"
    mount.mkdir()

    def guard(move):
        def guarded(source, target):
            if pathlib.Path(target) == mount:
                raise OSError(errno.EBUSY, "Device or resource busy")
            if not pathlib.Path(source).is_relative_to(mount):
                raise OSError(errno.EXDEV, "Invalid cross-device link")
            move(source, target)

        return guarded

    for name in ("replace", "rename"):
        monkeypatch.setattr(os, name, guard(getattr(os, name)))
    fill(check_out(str(tmp_path / path)))
    assert content(tmp_path / path) == FILES


# ---------------------------------------------------------------------------------------------
# what is in the way


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["notes"], r"is not empty: it has notes\. Give a new or empty directory"),
        (["a", "b", "c", "d", "e"], r"it has a, b, c and 2 more"),
        ([".hidden"], r"it has \.hidden"),
        ([".partial-x"], r"it has \.partial-x"),
    ],
)
def test_a_directory_with_files_is_refused_by_their_names(tmp_path, names, message):
    for name in names:
        (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=message):
        check_out(str(tmp_path))
    assert content(tmp_path) == dict.fromkeys(names, "mine")


def test_what_desktops_and_file_systems_leave_is_no_content(tmp_path):
    names = [".DS_Store", "._config", ".nfs00000001", "Thumbs.db", "desktop.ini", "lost+found"]
    for name in names:
        (tmp_path / name).write_text("theirs")
    fill(check_out(str(tmp_path)))
    assert content(tmp_path) == FILES | dict.fromkeys(names, "theirs")


def test_drafts_of_killed_processes_go_and_others_stay(tmp_path):
    ended, running = (tmp_path / f".partial-{pid}" for pid in (dead_process(), os.getppid()))
    for draft in (ended, running):
        draft.mkdir()
        (draft / "config.json").write_text("half")
    fill(check_out(str(tmp_path)))
    assert content(tmp_path) == FILES | {f"{running.name}/config.json": "half"}


@pytest.mark.parametrize("is_there", [True, False])
def test_a_draft_of_a_killed_process_with_our_number(tmp_path, is_there):
    """In a container the numbers of processes come again."""
    out = tmp_path / "out"
    draft = tmp_path / f".out.{os.getpid()}.partial"
    if is_there:
        draft = out / f".partial-{os.getpid()}"
    draft.mkdir(parents=True)
    (draft / "old").write_text("half")
    fill(check_out(str(out)))
    assert content(tmp_path) == {f"out/{name}": text for name, text in FILES.items()}


def test_a_file_that_appears_meanwhile_is_kept_and_the_export_is_not(tmp_path):
    with pytest.raises(RunError, match="Another process has created"):
        with new_directory(check_out(str(tmp_path))) as draft:
            for name in ("a", "model.safetensors", "z"):
                (draft / name).write_text("mine")
            (tmp_path / "model.safetensors").write_text("theirs")
    assert content(tmp_path) == {"model.safetensors": "theirs"}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "--out is empty"),
        (" ", "--out is empty"),
        ("file", "is a file"),
        ("file/new", r"cannot be written: .*file is a file"),
        ("nothing", "is a link to nothing"),
        ("/proc/new", r"cannot be written: /proc: "),
        ("n" * 300, "File name too long"),
        ("a/" + "n" * 300, "File name too long"),
    ],
)
def test_what_cannot_work_is_refused_beforehand(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "nothing").symlink_to("gone")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message):
        check_out(path)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_place_that_may_not_be_written(tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(output_dir.tempfile, "mkdtemp", refuse)
    for path in (tmp_path, tmp_path / "new" / "er"):
        with pytest.raises(UserError, match=f"{tmp_path}: Permission denied. Give another"):
            check_out(str(path))
    assert list(tmp_path.iterdir()) == []


def test_free_space_is_that_of_the_target_s_file_system(tmp_path, monkeypatch):
    asked = []

    def usage(path):
        asked.append(path)
        return shutil._ntuple_diskusage(10 << 30, 8 << 30, 2 << 30)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    check_space(tmp_path / "a" / "b", 1 << 30)
    with pytest.raises(UserError, match="needs 3.00 GiB, but .* has 2.00 GiB free"):
        check_space(tmp_path / "a" / "b", 3 << 30)
    assert asked == [tmp_path, tmp_path]


def test_files_get_the_modes_of_new_files(tmp_path):
    (tmp_path / "plain").write_text("")
    with new_directory(tmp_path / "out") as draft:
        (draft / "templates").mkdir()
        for name in ("model.safetensors", "templates/tool.jinja"):
            (draft / name).write_text("")
            (draft / name).chmod(0o600)
    mode = (tmp_path / "plain").stat().st_mode
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert len(files) == 2 and {file.stat().st_mode for file in files} == {mode}
