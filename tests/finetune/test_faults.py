"""Named points: nothing unless armed, and then exactly what was asked for."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jaxserve import faults

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _nothing_stays_armed():
    yield
    faults.disarm()


def test_nothing_happens_unless_armed():
    for point in faults.POINTS:
        faults.hit(point)
    assert faults.armed() == {}


def test_only_the_named_hit_of_the_named_point_fails():
    faults.arm("fs.fsync=EIO@2; fs.write=ENOSPC")
    faults.hit("fs.fsync")
    faults.hit("fs.rename")
    with pytest.raises(OSError) as caught:
        faults.hit("fs.fsync")
    assert caught.value.errno == errno.EIO
    faults.hit("fs.fsync")
    with pytest.raises(OSError) as caught:
        faults.hit("fs.write")
    assert caught.value.errno == errno.ENOSPC
    assert faults.armed() == {"fs.fsync": 3, "fs.write": 1}
    faults.arm("ckpt.begin=raise")
    faults.hit("fs.fsync")
    with pytest.raises(RuntimeError, match=r"ckpt\.begin"):
        faults.hit("ckpt.begin")


def test_a_kill_is_a_sigkill():
    code = "from jaxserve import faults; faults.arm('ckpt.begin=kill'); faults.hit('ckpt.begin')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ("nowhere=kill", "'nowhere' is no point"),
        ("fs.fsync", "action ''"),
        ("fs.fsync=explode", "action 'explode'"),
        ("fs.fsync=EIO@0", "count '0'"),
        ("fs.fsync=EIO@x", "count 'x'"),
    ],
)
def test_a_wrong_specification_is_refused(spec, named):
    with pytest.raises(ValueError, match=named):
        faults.arm(spec)
    assert faults.armed() == {}


def test_a_point_that_is_not_in_the_table_is_a_bug():
    faults.arm("fs.fsync=EIO")
    with pytest.raises(AssertionError):
        faults.hit("nowhere")
