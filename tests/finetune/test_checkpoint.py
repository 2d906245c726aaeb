"""A checkpoint is whole or absent: kills at every point, failing calls, flipped bits, foreign directories."""

import fcntl
import hashlib
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxserve import faults
from jaxserve.finetune import durable
from jaxserve.finetune.checkpoint import CheckpointWriter, load_latest
from jaxserve.finetune.durable import LOCK, Damaged, StepStore, newest, verify, write_file
from jaxserve.finetune.errors import CheckpointError, CheckpointMismatch
from jaxserve.finetune.optimizer import init_state

ROOT = Path(__file__).parents[2]
IDENTITY = {"job": "j1", "base": "ab", "dataset": "cd", "config": {"rank": 4}}
SAVE_POINTS = [point for point in faults.POINTS if point.startswith(("ckpt.", "fs."))]


@pytest.fixture(autouse=True)
def _nothing_stays_armed():
    yield
    faults.disarm()


@pytest.fixture(scope="module")
def state():
    masters = {(layer, "q_proj"): {"a": jnp.full((4, 6), layer + 0.1), "b": jnp.zeros((6, 4))} for layer in range(2)}
    return {
        "masters": masters,
        "optimizer": init_state("adamw", masters),
        "gradients": [np.arange(3, dtype=np.float64) / 3, np.array(2**40), np.ones(2, ml_dtypes.bfloat16)],
        "key": np.array([1, 2**32 - 1], np.uint32),
        "nothing": np.zeros((0, 3), np.float32),
        "special": np.array([np.nan, np.inf, -0.0, 1e-45], np.float32),
    }


@pytest.fixture(scope="module")
def saved(state, tmp_path_factory):
    """A directory with checkpoints 10 and 20; tests copy it."""
    directory = tmp_path_factory.mktemp("saved") / "job"
    with CheckpointWriter(directory, IDENTITY) as writer:
        for step in (10, 20):
            writer.save(step, state, {"losses": [1 / 3, 0.1], "cursor": {"epoch": 1, "position": step}})
    return directory


@pytest.fixture
def job(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "job"))


def events():
    seen = []
    return seen, lambda kind, message: seen.append((kind, message))


def files_of(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file())


def fill(text: str):
    def write(path: Path) -> None:
        (path / "sub").mkdir()
        write_file(path / "a", text.encode())
        faults.hit("ckpt.mid_files")
        write_file(path / "sub" / "b", text.encode() * 100)

    return write


# what comes back


def test_every_leaf_comes_back_bit_for_bit(saved, state):
    checkpoint = load_latest(saved, like=state, expect=IDENTITY)
    assert checkpoint is not None
    assert checkpoint.step == 20
    assert jax.tree.structure(checkpoint.state) == jax.tree.structure(state)
    for found, wanted in zip(jax.tree.leaves(checkpoint.state), jax.tree.leaves(state), strict=True):
        assert found.dtype == wanted.dtype
        assert found.shape == wanted.shape
        assert found.tobytes() == np.asarray(wanted).tobytes()


def test_the_json_part_comes_back_with_every_digit(saved):
    checkpoint = load_latest(saved)
    assert checkpoint is not None
    assert checkpoint.meta == {"losses": [1 / 3, 0.1], "cursor": {"epoch": 1, "position": 20}}
    assert checkpoint.identity == IDENTITY
    assert set(checkpoint.state) >= {"masters/(0, 'q_proj')/a", "gradients/1", "nothing"}


def test_a_relative_directory_can_be_read(saved, state, monkeypatch):
    monkeypatch.chdir(saved.parent)
    assert load_latest(saved.name, like=state, expect=IDENTITY).step == 20


def test_a_save_in_the_background_keeps_the_values_of_its_call(tmp_path):
    value = np.zeros(4)
    with CheckpointWriter(tmp_path, IDENTITY, keep=9) as writer:
        saves = []
        for step in range(3):
            saves.append(writer.start_save(step, {"x": value}, {}))
            value += 1
        assert [save.result().name for save in saves] == [f"step-{step:010d}" for step in range(3)]
    checkpoint = load_latest(tmp_path)
    assert checkpoint is not None
    assert checkpoint.state["x"].tolist() == [2, 2, 2, 2]


def test_a_save_in_the_background_says_that_it_failed(tmp_path):
    with CheckpointWriter(tmp_path, IDENTITY) as writer:
        faults.arm("fs.fsync=EIO")
        save = writer.start_save(1, {"x": np.zeros(1)}, {})
        with pytest.raises(CheckpointError, match="Input/output error"):
            save.result()


def test_what_is_no_json_is_refused_before_anything_is_written(tmp_path):
    with CheckpointWriter(tmp_path, IDENTITY) as writer:
        with pytest.raises(ValueError):
            writer.save(1, {"x": np.zeros(1)}, {"loss": math.nan})
        assert load_latest(tmp_path) is None


@pytest.mark.parametrize("place", ["missing", "empty"])
def test_where_there_are_no_checkpoints_there_is_none(tmp_path, place):
    (tmp_path / "empty").mkdir()
    assert load_latest(tmp_path / place) is None
    assert not (tmp_path / "missing").exists()


# belonging


@pytest.mark.parametrize("field", IDENTITY)
def test_a_checkpoint_of_something_else_is_refused_by_field(job, field):
    other = IDENTITY | {field: "other"}
    with pytest.raises(CheckpointMismatch, match=field) as caught:
        load_latest(job, expect=other)
    assert caught.value.fields == [field]
    assert caught.value.code == "checkpoint_mismatch"
    with pytest.raises(CheckpointMismatch, match=field):
        CheckpointWriter(job, other)
    CheckpointWriter(job, IDENTITY).close()  # the refused one holds no lock


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda state: state | {"key": np.zeros(3, np.uint32)}, "key"),
        (lambda state: state | {"key": np.zeros(2, np.int32)}, "key"),
        (lambda state: state | {"more": np.zeros(2)}, "more"),
        (lambda state: {name: leaf for name, leaf in state.items() if name != "key"}, "key"),
        (lambda state: state | {"optimizer": init_state("sgd", state["masters"])}, "optimizer/"),
    ],
    ids=["shape", "dtype", "missing", "extra", "optimizer"],
)
def test_a_checkpoint_with_other_leaves_is_refused_by_leaf(saved, state, change, field):
    with pytest.raises(CheckpointMismatch, match=field) as caught:
        load_latest(saved, like=change(state))
    assert all(name.startswith(field) for name in caught.value.fields)


def test_shapes_are_enough_to_load(saved, state):
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), {"o": state["optimizer"]})["o"]
    checkpoint = load_latest(saved, like=state | {"optimizer": shapes})
    assert checkpoint is not None
    assert checkpoint.state["optimizer"][1].count == 0


# damage


def test_each_of_200_flipped_bits_is_detected(job):
    path, rng = job / "step-0000000020", random.Random(0)
    files = files_of(path)
    sizes = [file.stat().st_size for file in files]
    targets = [file for file, size in zip(files, sizes, strict=True) if size]
    picks = targets + rng.choices(files, sizes, k=200 - len(targets))
    for file in picks:
        whole = file.read_bytes()
        place, bit = rng.randrange(len(whole)), rng.randrange(8)
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
        with pytest.raises(Damaged):
            verify(path, 20)
        file.write_bytes(whole)
    verify(path, 20)


@pytest.mark.parametrize("name", ["MANIFEST", "job.json", "largest"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "remove", "append", "link", "fifo"])
def test_a_damaged_checkpoint_is_passed_over_with_an_event(job, name, damage):
    path = job / "step-0000000020"
    file = max(files_of(path), key=lambda file: file.stat().st_size) if name == "largest" else path / name
    whole = file.read_bytes()
    file.unlink()
    if damage in ("flip", "cut", "empty", "append"):
        file.write_bytes({"flip": whole[:-1] + b"\0", "cut": whole[:-1], "empty": b"", "append": whole + b"\n"}[damage])
    elif damage == "link":
        shutil.copy(job / "step-0000000010" / file.relative_to(path), job / "copy")
        file.symlink_to(job / "copy")
    elif damage == "fifo":
        os.mkfifo(file)
    seen, listen = events()
    checkpoint = load_latest(job, on_event=listen)
    assert checkpoint is not None
    assert checkpoint.step == 10
    assert [kind for kind, _ in seen if kind != "unknown_name"] == ["damaged"]
    assert "20" in next(message for kind, message in seen if kind == "damaged")


@pytest.mark.parametrize("extra", ["extra", "state/extra", "state/new/extra"])
def test_a_file_that_is_not_in_the_manifest_damages_a_checkpoint(job, extra):
    file = job / "step-0000000020" / extra
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"")
    with pytest.raises(Damaged, match="not in the manifest"):
        verify(job / "step-0000000020", 20)


def test_a_checkpoint_under_another_step_s_name_is_damaged(job):
    (job / "step-0000000020").rename(job / "step-0000000030")
    checkpoint = load_latest(job)
    assert checkpoint is not None
    assert checkpoint.step == 10


def test_with_all_damaged_there_is_none_and_nothing_is_removed(job):
    for step in (10, 20):
        (job / f"step-{step:010d}" / "job.json").unlink()
    before = files_of(job)
    assert load_latest(job) is None
    assert files_of(job) == before


NAMES = [
    "10",
    "00010",
    "step-10",
    "step-00000000030",
    "step-9223372036854775808",
    "step-000000003a",
    "x",
    "Step-0000000030",
]


def test_names_that_are_not_ours_are_left_alone(job, state):
    for name in NAMES:
        shutil.copytree(job / "step-0000000020", job / name)
    (job / "step-0000000040").symlink_to(job / "step-0000000020")
    (job / ".tmp-0000000030-0000000g").mkdir()
    seen, listen = events()
    checkpoint = load_latest(job, on_event=listen)
    assert checkpoint is not None
    assert checkpoint.step == 20
    assert len(seen) == len(NAMES) + 2
    with CheckpointWriter(job, IDENTITY, keep=1) as writer:
        writer.save(50, state, {})
    left = {entry.name for entry in job.iterdir()}
    assert left == {*NAMES, "step-0000000040", ".tmp-0000000030-0000000g", "step-0000000050", "LOCK"}


def rewrite_manifest(path: Path, **changes) -> None:
    manifest = json.loads((path / "MANIFEST").read_bytes().split(b"\n")[0]) | changes
    body = json.dumps(manifest).encode()
    (path / "MANIFEST").write_bytes(body + b"\n" + hashlib.sha256(body).hexdigest().encode() + b"\n")


def test_a_checkpoint_of_a_later_version_is_refused_and_stays(job):
    rewrite_manifest(job / "step-0000000020", format=2, files={})
    before = files_of(job)
    for open_it in (load_latest, lambda path: CheckpointWriter(path, IDENTITY)):
        with pytest.raises(CheckpointError, match="format 2") as caught:
            open_it(job)
        assert caught.value.code == "newer_format"
    assert files_of(job) == before


@pytest.mark.parametrize("found", [None, 0, -1, "2", 1.5])
def test_a_format_that_never_was_is_damage(job, found):
    rewrite_manifest(job / "step-0000000020", format=found)
    checkpoint = load_latest(job)
    assert checkpoint is not None
    assert checkpoint.step == 10


# places


def test_a_copy_with_other_times_behind_a_link_loads(job, tmp_path):
    for file in files_of(job):
        os.utime(file, (1, 1))
    link = tmp_path / "link"
    link.symlink_to(job)
    checkpoint = load_latest(link, expect=IDENTITY)
    assert checkpoint is not None
    assert checkpoint.step == 20
    with CheckpointWriter(link, IDENTITY), pytest.raises(CheckpointError, match="another process"):
        CheckpointWriter(job, IDENTITY)


def test_a_directory_has_one_writer(job, state):
    with CheckpointWriter(job, IDENTITY) as writer:
        with pytest.raises(CheckpointError) as caught:
            CheckpointWriter(job, IDENTITY)
        assert caught.value.code == "busy"
        assert str(caught.value).startswith(f"{os.path.realpath(job)}: ")
        writer.save(30, state, {})
    CheckpointWriter(job, IDENTITY).close()


READ_ONLY = """
import os, sys
from jaxserve.finetune.durable import StepStore, newest
from jaxserve.finetune.errors import CheckpointError
if os.getuid() == 0:
    os.setuid(65534)
print(newest(sys.argv[1]).step)
try:
    StepStore(sys.argv[1], 2)
except CheckpointError as error:
    print(error.code, error)
"""


def test_a_directory_that_cannot_be_written_is_read_and_refused_for_writing(job):
    (job / "LOCK").unlink()
    with tempfile.TemporaryDirectory() as place:  # tmp_path is closed to other users
        os.chmod(place, 0o755)
        copy = shutil.copytree(job, Path(place) / "job")
        copy.chmod(0o555)
        command = [sys.executable, "-c", READ_ONLY, str(copy)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        copy.chmod(0o755)
    refused = f"storage {os.path.realpath(copy)}: checkpoints cannot be written here: Permission denied"
    assert done.stdout.splitlines() == ["20", refused], done


@pytest.mark.parametrize("what", ["a file", "below a file", "a read-only file system"])
def test_what_cannot_be_a_directory_is_refused_for_writing(tmp_path, what):
    (tmp_path / "file").write_text("")
    if what == "a read-only file system":
        faults.arm("fs.mkdir=EROFS")
    place = {"a file": "file", "below a file": "file/x", "a read-only file system": "x"}[what]
    with pytest.raises(CheckpointError, match="cannot be written") as caught:
        StepStore(tmp_path / place, 1)
    assert caught.value.code == "storage"


# keeping


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_are_kept(tmp_path, keep):
    store = StepStore(tmp_path, keep)
    for step in range(5):
        store.save(step, fill(str(step)))
        names = sorted(entry.name for entry in tmp_path.iterdir() if entry.name != "LOCK")
        assert names == [f"step-{kept:010d}" for kept in range(max(0, step + 1 - keep), step + 1)]


def test_a_damaged_checkpoint_does_not_count_as_kept(job, state):
    (job / "step-0000000020" / "job.json").unlink()
    with CheckpointWriter(job, IDENTITY, keep=2) as writer:
        writer.save(30, state, {})
        assert (job / "step-0000000010").exists()
        writer.save(40, state, {})
        assert sorted(path.name for path in job.glob("step-*")) == ["step-0000000030", "step-0000000040"]


def test_a_damaged_checkpoint_gives_way_to_one_of_its_step(job, state):
    (job / "step-0000000020" / "job.json").unlink()
    with CheckpointWriter(job, IDENTITY) as writer:
        writer.save(20, state, {"again": True})
    checkpoint = load_latest(job)
    assert checkpoint is not None
    assert checkpoint.meta == {"again": True}


@pytest.mark.parametrize("step", [20, 15, 0, -1, 10**10])
def test_a_step_that_does_not_come_after_the_last_is_refused(job, step):
    store = StepStore(job, 2)
    with pytest.raises(CheckpointError, match=f"checkpoint {step}: must be above 20"):
        store.save(step, fill("x"))


def test_leftovers_of_a_killed_writer_go_when_the_next_one_opens(job):
    for name in (".tmp-0000000030-0123abcd", ".tmp-0000000010-ffffffff"):
        shutil.copytree(job / "step-0000000020", job / name)
    checkpoint = load_latest(job)
    assert checkpoint is not None
    assert checkpoint.step == 20
    assert len(list(job.glob(".tmp-*"))) == 2  # who only reads removes nothing
    StepStore(job, 2).close()
    assert list(job.glob(".tmp-*")) == []


# failing calls


@pytest.mark.parametrize("error", ["EIO", "ENOSPC", "raise"])
@pytest.mark.parametrize("point", SAVE_POINTS)
def test_whichever_call_of_a_save_fails_the_last_good_checkpoint_is_found(tmp_path, point, error):
    store = StepStore(tmp_path, 1)
    store.save(1, fill("1"))
    step, good, failures, reached = 1, 1, 0, True
    while reached:
        step += 1
        faults.arm(f"{point}={error}@{step - 1}")
        try:
            store.save(step, fill(str(step)))
            good = step
        except CheckpointError:
            failures += 1
        reached = faults.armed()[point] >= step - 1
        faults.disarm()
        found = newest(tmp_path)
        assert found is not None
        assert found.step == good
        assert (found.path / "a").read_text() == str(good)
    assert step > 2
    # once a checkpoint has its name on the disk, nothing can make its save fail
    assert (failures > 0) == (point not in ("ckpt.committed", "ckpt.mid_delete"))
    store.save(step + 1, fill("x"))
    assert [path.name for path in tmp_path.glob("step-*")] == [f"step-{step + 1:010d}"]


def test_a_failed_flush_is_never_taken_for_success(tmp_path):
    store = StepStore(tmp_path, 1)
    store.save(1, fill("1"))
    for hit in range(1, 8):
        faults.arm(f"fs.fsync=EIO@{hit}")  # once, then the disk is well again
        with pytest.raises(CheckpointError) as caught:
            store.save(2, fill("2"))
        assert caught.value.code == "storage"
        assert caught.value.errno == 5
        assert [path.name for path in tmp_path.iterdir() if path.name != "LOCK"] == ["step-0000000001"]


def test_an_error_while_an_old_checkpoint_is_removed_is_an_event(tmp_path):
    seen, listen = events()
    store = StepStore(tmp_path, 1, listen)
    store.save(1, fill("1"))
    faults.arm("ckpt.mid_delete=EIO")
    store.save(2, fill("2"))
    assert [kind for kind, _ in seen] == ["not_removed"]
    found = newest(tmp_path)
    assert found is not None
    assert found.step == 2


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    log = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (log.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "rename", lambda old, new: (log.append(f"rename {new}"), rename(old, new)))
    with CheckpointWriter(tmp_path / "job", IDENTITY) as writer:
        log.clear()
        path = writer.save(1, {"x": np.zeros(5000)}, {})
    renamed = log.index(f"rename {path}")
    flushed = [name.partition("/.tmp-")[2].partition("/")[2] for name in log[:renamed]]
    inside = {str(entry.relative_to(path)) for entry in path.rglob("*")}
    assert inside <= set(flushed)
    assert flushed[-2:] == ["MANIFEST", ""]  # and last of all the directory itself
    assert str(tmp_path / "job") in log[renamed:]


# kills


def kill_writers(tmp_path, kind: str, kills: int, *points: str) -> dict:
    command = [sys.executable, str(ROOT / "tests" / "killed_writer.py"), kind, str(tmp_path), str(kills), "0", *points]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(done.stdout)


def assert_tidy(report: dict) -> None:
    assert report["lost"] == []
    assert report["steps"] > 0
    assert all(name == "LOCK" or name.startswith("step-") for name in report["left"])


def test_a_writer_killed_at_any_named_point_leaves_the_newest_whole(tmp_path):
    report = kill_writers(tmp_path, "plain", 2 * len(SAVE_POINTS), *SAVE_POINTS)
    assert_tidy(report)


def test_a_writer_killed_at_random_moments_leaves_the_newest_whole(tmp_path):
    assert_tidy(kill_writers(tmp_path, "plain", 30))


def test_a_writer_of_arrays_killed_at_named_points_leaves_the_newest_whole(tmp_path):
    points = [point for point in SAVE_POINTS if point.startswith("ckpt.")]
    assert_tidy(kill_writers(tmp_path, "orbax", len(points), *points))


@pytest.mark.slow
def test_a_thousand_kills_lose_nothing(tmp_path):
    (tmp_path / "plain").mkdir()
    (tmp_path / "orbax").mkdir()
    assert_tidy(kill_writers(tmp_path / "plain", "plain", 1000))
    assert_tidy(kill_writers(tmp_path / "orbax", "orbax", 50))


def test_the_writer_that_is_killed_needs_no_jax():
    code = "import sys, jaxserve.finetune.durable as d; raise SystemExit('jax' in sys.modules or not d)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    assert durable.FORMAT == 1


def test_who_only_looks_whether_a_directory_is_held_keeps_nobody_out(tmp_path, monkeypatch):
    CheckpointWriter(tmp_path, {}).close()
    with open(tmp_path / LOCK) as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        monkeypatch.setattr(durable.time, "sleep", lambda seconds: fcntl.flock(looking, fcntl.LOCK_UN))
        CheckpointWriter(tmp_path, {}).close()


def test_what_orbax_hides_of_a_full_disk_is_told(tmp_path):
    def fill(path):
        raise ValueError("RESOURCE_EXHAUSTED: Error writing \"a/b\" in OCDBT database [os_error_code='28']")

    store = StepStore(tmp_path, 2)
    with pytest.raises(CheckpointError, match="checkpoint 1 was not written: No space left") as caught:
        store.save(1, fill)
    assert caught.value.errno == 28
    store.close()
