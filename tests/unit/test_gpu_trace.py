"""What a trace says of a device's time."""

import pytest

from jaxserve.bench.gpu_trace import record, summed


def event(name, start, length, pid=1):
    return {"ph": "X", "pid": pid, "tid": 1, "name": name, "ts": start, "dur": length}


EVENTS = [
    {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "/device:GPU:0"}},
    {"ph": "M", "pid": 2, "name": "process_name", "args": {"name": "/host:CPU"}},
    {"ph": "M", "pid": 3, "name": "process_name", "args": {"name": "/device:GPU:1"}},
    event("python", 0, 9000, pid=2),
    event("block_attention_mosaic_gpu_kernel", 1000, 40),
    event("gemm_fusion_dot_3_12", 1045, 20),
    event("gemm_fusion_dot.7", 2065, 30),
    event("gemm_fusion_dot", 2065, 500, pid=3),
]


def test_kernels_of_one_kind_are_summed_and_the_host_and_other_devices_left_out():
    trace = summed(EVENTS)
    assert [(k.name, round(k.seconds * 1e6), k.count) for k in trace.kernels] == [
        ("gemm_fusion_dot", 50, 2),
        ("block_attention", 40, 1),
    ]
    assert trace.busy == pytest.approx(90e-6)
    assert trace.idle == pytest.approx(1000e-6)  # not the 5 us between kernels of one step


def test_a_trace_without_a_device_has_no_kernels():
    trace = summed(EVENTS[3:4])
    assert trace.kernels == ()
    assert trace.busy == trace.idle == 0


def test_a_recorded_run_runs_once():
    runs = []
    assert record(lambda: runs.append(1)).kernels == ()
    assert runs == [1]
