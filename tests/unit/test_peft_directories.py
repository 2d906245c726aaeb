"""A directory that is no plain pair of files is refused by name, without blocking (L01)."""

import os
import pickle
import socket
import sys
import threading

import pytest
from tiny_adapters import (
    CONFIG,
    TENSORS,
    TINY,
    refusal,
    write_adapter,
)

from jaxserve.adapters.files import NO_LINKS
from jaxserve.adapters.peft_io import load_peft


def make_fifo(path):
    os.mkfifo(path)


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as sock:
        here = os.getcwd()
        os.chdir(path.parent)  # the name of a socket must be short
        try:
            sock.bind(path.name)
        finally:
            os.chdir(here)


SPECIAL = {
    "fifo": make_fifo,
    "socket": make_socket,
    "directory": lambda path: path.mkdir(),
    "device": lambda path: os.symlink("/dev/zero", path),
    "loop": lambda path: os.symlink(path.name, path),
    "dangling link": lambda path: os.symlink("nowhere", path),
}


def in_time(work, seconds=5.0):
    """Runs ``work`` in a thread and fails if it blocks."""
    result = []
    thread = threading.Thread(target=lambda: result.append(work()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert result, "blocked"
    return result[0]


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
@pytest.mark.parametrize("make", SPECIAL.values(), ids=SPECIAL)
def test_files_that_are_no_regular_files_are_refused_without_blocking(tmp_path, make, name):
    write_adapter(tmp_path)
    (tmp_path / name).unlink()
    make(tmp_path / name)
    error = in_time(lambda: refusal(tmp_path))
    assert error.field == name
    assert "not a regular file" in str(error)


@pytest.mark.parametrize("make", [make_fifo, SPECIAL["device"]], ids=["fifo", "device"])
def test_a_file_swapped_after_the_check_is_neither_followed_nor_waited_for(tmp_path, monkeypatch, make):
    write_adapter(tmp_path)
    regular, real = os.stat(tmp_path / CONFIG), os.stat
    (tmp_path / TENSORS).unlink()
    make(tmp_path / TENSORS)
    monkeypatch.setattr(os, "stat", lambda path, **options: regular if path == TENSORS else real(path, **options))
    assert in_time(lambda: refusal(tmp_path)).field == TENSORS


@pytest.mark.parametrize("make", [make for kind, make in SPECIAL.items() if kind != "directory"])
def test_paths_that_are_no_directories_are_refused_without_blocking(tmp_path, make):
    make(tmp_path / "adapter")
    assert in_time(lambda: refusal(tmp_path / "adapter")).field == "path"


def test_a_missing_directory_a_file_and_a_linked_directory_are_refused_by_name(tmp_path):
    assert "does not exist" in str(refusal(tmp_path / "no"))
    write_adapter(tmp_path / "real")
    assert "not a directory" in str(refusal(tmp_path / "real" / CONFIG))
    os.symlink(tmp_path / "real", tmp_path / "link")
    assert str(refusal(tmp_path / "link")).endswith(f"is a symbolic link, not a directory{NO_LINKS}")
    assert "symbolic link" in str(refusal(str(tmp_path / "link") + "/"))
    for odd in ("a\0b", "x" * 5000, "\udcff"):
        assert refusal(tmp_path / odd).field == "path"


def test_a_linked_file_is_refused_even_when_its_target_is_good(tmp_path):
    write_adapter(tmp_path / "real")
    write_adapter(tmp_path / "other")
    (tmp_path / "other" / TENSORS).unlink()
    os.symlink(tmp_path / "real" / TENSORS, tmp_path / "other" / TENSORS)
    assert str(refusal(tmp_path / "other")) == f"{TENSORS} is a symbolic link, not a regular file{NO_LINKS}"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads everything")
@pytest.mark.parametrize("name", [CONFIG, TENSORS, "."])
def test_what_may_not_be_read_is_refused_by_name(tmp_path, name):
    write_adapter(tmp_path / "a")
    os.chmod(tmp_path / "a" / name, 0)
    try:
        assert "denied" in str(refusal(tmp_path / "a"))
    finally:
        os.chmod(tmp_path / "a" / name, 0o700)


def test_a_device_node_is_refused(tmp_path):
    write_adapter(tmp_path)
    (tmp_path / TENSORS).unlink()
    try:
        os.mknod(tmp_path / TENSORS, 0o600 | 0o020000, os.makedev(1, 5))  # /dev/zero
    except OSError:
        pytest.skip("device nodes need privileges")
    assert "a device" in str(in_time(lambda: refusal(tmp_path)))


def test_only_the_two_files_are_ever_opened_among_many(tmp_path):
    write_adapter(tmp_path)
    for index in range(500):
        (tmp_path / f"file{index}").touch()
    for name in ("training_args.bin", "optimizer.pt", "adapter_model.bin", "README.md", "auto_map.py"):
        (tmp_path / name).write_bytes(pickle.dumps({"no": "thing"}))
    opened, watching = [], [True]

    def hook(event, args):
        if watching[0] and event in (
            "open",
            "exec",
            "subprocess.Popen",
            "pickle.find_class",
            "socket.connect",
            "os.listdir",
            "os.scandir",
        ):
            opened.append((event, str(args[0])))

    sys.addaudithook(hook)
    try:
        load_peft(tmp_path, TINY)
    finally:
        watching[0] = False
    assert {name for event, name in opened if event == "open" and not name.isdigit()} == {
        str(tmp_path),
        CONFIG,
        TENSORS,
    }
    assert {event for event, _ in opened} == {"open"}
