"""The programs of jobs beside threads that change what they are of; nothing here is compiled for a model."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from jaxserve.engine import lane_sums
from jaxserve.engine.gradient import TrainState
from jaxserve.engine.job_programs import DeviceShapes, JobShapes
from jaxserve.engine.lane_sums import LaneSums


def test_scales_that_come_while_a_jobs_programs_are_compiled_get_programs_too(monkeypatch):
    """As another thread loads the first adapter that has some."""
    nothing: Any = None
    device = DeviceShapes(nothing, nothing, TrainState(acc=[], lanes={}), {}, None, None)
    shape: Any = SimpleNamespace(acc_pages=0)
    sums = LaneSums(shape, nothing, nothing, lambda: TrainState(acc=[], lanes={}), lambda: device)

    def compile_programs(found: DeviceShapes, job: JobShapes) -> str:
        nonlocal device
        if found.scales is None:
            device = replace(device, scales={})
            sums.enable_scales()
        return "plain" if found.scales is None else "scaled"

    monkeypatch.setattr(lane_sums, "compile_programs", compile_programs)
    monkeypatch.setattr(lane_sums, "empty_scale_lanes", lambda *_: {})
    shapes = JobShapes({}, {}, {}, "adamw", 4, 1)
    sums.compile(shapes, scaled=False)
    assert (sums.programs(shapes), sums.programs(shapes, scales=False)) == ("scaled", "plain")


def test_what_a_job_needs_once_there_are_scales_is_compiled_before_they_come(monkeypatch):
    """Else the loop would stand still for it."""
    nothing: Any = None
    device, compiled = DeviceShapes(nothing, nothing, TrainState(acc=[], lanes={}), {}, None, None), []
    shape: Any = SimpleNamespace(acc_pages=0)
    sums = LaneSums(shape, nothing, nothing, lambda: TrainState(acc=[], lanes={}), lambda: device)
    monkeypatch.setattr(lane_sums, "compile_programs", lambda found, job: compiled.append(found.scales))
    monkeypatch.setattr(lane_sums, "empty_scale_lanes", lambda *_: {})
    sums.compile(JobShapes({}, {}, {}, "adamw", 4, 1), scaled=False)
    device = replace(device, scales={})
    sums.compile_ahead(device)
    assert compiled == [None, {}]
    sums.enable_scales()
    assert compiled == [None, {}]
