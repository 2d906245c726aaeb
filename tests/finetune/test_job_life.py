"""A job's life beside its steps: validation, checkpoints and what a kill leaves, pauses, a disk that refuses."""

import contextlib
import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_adapters
import tiny_models
from test_jobs import SIZES, examples, requests, settled

import jaxserve
from jaxserve import faults
from jaxserve.adapters.peft_io import load_peft
from jaxserve.bench.replay import Replay
from jaxserve.bench.workload import NOBODY
from jaxserve.engine import programs, saver, trainer
from jaxserve.engine.lanes import weights_of
from jaxserve.finetune.durable import newest
from jaxserve.finetune.errors import CheckpointError, CheckpointMismatch
from jaxserve.finetune.folder import read_events, read_job

pytestmark = pytest.mark.quick_compiles

JOB = {"rank": 4, "alpha": 8, "learning_rate": 1e-2, "batch_size": 3, "max_steps": 6, "dropout": 0.1}
LIFE = {"max_finetune_jobs": 1, "finetune_window": 16, "finetune_stash_tokens": 0}
LIFE["jobs"] = [jaxserve.FinetuneConfig(method="dora", dropout=0.1)]  # whose steps know all that others need


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_models.build(tmp_path_factory.mktemp("model") / "m", "llama")


@pytest.fixture(scope="module")
def engine(path):
    return jaxserve.Engine.from_pretrained(path, **SIZES | LIFE)


@pytest.fixture(autouse=True)
def _nothing_is_left(engine):
    yield
    faults.disarm()
    for job in engine.jobs():
        job.cancel()
    settled(engine)
    assert engine.stats()["recompiles"] == 0


def content(engine, name):
    """An adapter's arrays, and nothing else, as bytes."""
    return as_bytes(engine.adapters.get(name).weights.fetched)


def as_bytes(weights):
    pairs = [weights.pairs[key] for key in sorted(weights.pairs)]
    vectors = [weights.vectors[key].value for key in sorted(weights.vectors)]
    return b"".join(x.tobytes() for pair in pairs for x in (pair.a, pair.b)) + b"".join(v.tobytes() for v in vectors)


def until(engine, condition, limit=2000):
    for _ in range(limit):
        if condition():
            return
        engine.step()
    raise AssertionError("it never comes to that")


@pytest.fixture(scope="module")
def undisturbed(engine):
    job = engine.finetune(examples(1), adapter="plain", validation_fraction=0.3, eval_steps=2, **JOB).wait()
    return job.losses, job.validation_losses, content(engine, "plain")


def test_steps_without_dropout_are_compiled_for_the_first_job_that_has_none(engine, path, undisturbed):
    new = jaxserve.Engine.from_pretrained(path, **SIZES | LIFE)
    sizes = {bucket for bucket, _ in new.core.specs if bucket.grad_rows}
    assert sizes
    assert not {(bucket, False) for bucket in sizes} & new.core.specs.keys()
    job = new.finetune(examples(1), adapter="a", validation_fraction=0.3, eval_steps=2, **JOB).wait()
    assert (job.losses, job.validation_losses) == undisturbed[:2]
    assert not {(bucket, False) for bucket in sizes} & new.core.specs.keys()
    plain = {**JOB, "dropout": 0.0}
    job = new.finetune(examples(1), adapter="b", **plain).wait()
    assert {(bucket, False) for bucket in sizes} <= new.core.specs.keys()
    assert job.losses == engine.finetune(examples(1), adapter="b", **plain).wait().losses
    assert new.stats()["recompiles"] == 0


def test_dpo_drops_nothing(engine):
    """Its slope comes from a forward of its own, under which the backward has to be the same function."""
    rng = np.random.default_rng(7)
    chosen, rejected = ((rng.integers(0, 300, 40).tolist(), None) for _ in range(2))
    pair = {"chosen": chosen, "rejected": rejected, "reference_logprobs": [0.0, 0.0]}
    norms = {}
    for dropout in (0.0, 0.5):
        for loss, batch in (("cross_entropy", [chosen]), ("dpo", [pair])):
            engine.open_adapter("c", rank=4, dropout=dropout)
            engine.forward_backward("c", batch, loss)
            norms[loss, dropout] = engine.optim_step("c")["gradient_norm"]
            engine.close_adapter("c")
    assert norms["dpo", 0.0] == norms["dpo", 0.5] > 0
    assert norms["cross_entropy", 0.0] != norms["cross_entropy", 0.5]


def test_validation_is_measured_before_between_and_after_and_learns_nothing(engine, undisturbed):
    losses, validation, trained = undisturbed
    assert [step for step, _ in validation] == [0, 2, 4, 6]
    again = engine.finetune(examples(1), adapter="a", validation_fraction=0.3, eval_steps=3, **JOB).wait()
    assert again.losses == losses
    assert content(engine, "a") == trained
    assert [step for step, _ in again.validation_losses] == [0, 3, 6]
    assert dict(again.validation_losses).items() >= {0: validation[0][1], 6: validation[-1][1]}.items()
    noted = [event.data["validation_loss"] for event in again.events() if event.kind == "validation"]
    assert noted == [loss for _, loss in again.validation_losses]


def test_validation_loss_is_the_models_own_log_probability(engine):
    data = examples(4)
    held = data[5]
    job = engine.finetune(data[:5], adapter="a", **{**JOB, "max_steps": 1, "dropout": 0})
    job._job.validation = engine_dataset(engine, [held])
    job.wait()
    params = jaxserve.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    for step, adapter in ((0, None), (1, "a")):  # B starts at zero: before the first step it is the base model
        (output,) = engine.generate([held[0]], params, adapter=adapter)
        values = [entry[token] for entry, token in zip(output.prompt_logprobs[1:], held[0][1:], strict=True)]
        assert dict(job.validation_losses)[step] == pytest.approx(-np.mean(values), rel=1e-5)


def engine_dataset(engine, source):
    from jaxserve.finetune.data import load_dataset

    return load_dataset(source, None, max_length=96, vocab_size=engine.model.vocab_size)


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_a_job_goes_on_from_what_a_kill_leaves_bit_by_bit(engine, tmp_path, method):
    """The directory is copied at random moments: each copy is what a process killed then would find."""
    fields = {**JOB, "method": method, "save_steps": 1, "validation_fraction": 0.3}
    if method == "ia3":
        fields["dropout"] = 0.0
    rng, copies = np.random.default_rng(0), []
    job = engine.finetune(examples(2), adapter="a", output_dir=str(tmp_path / "job"), **fields)
    while not job._job.done:
        engine.step()
        if rng.random() < 0.25:
            copies.append(tmp_path / f"copy-{len(copies)}")
            with contextlib.suppress(shutil.Error):  # files come and go meanwhile, as they do under a kill
                shutil.copytree(tmp_path / "job", copies[-1])
        assert job.status != "paused", job.events()
    job.wait()
    expected = job.losses, job.validation_losses, content(engine, "a"), job.trained_tokens
    assert (tmp_path / "job" / "adapter" / "adapter_model.safetensors").exists()
    resumed = []
    for place in copies[:: max(len(copies) // 5, 1)]:
        again = engine.finetune(examples(2), adapter="a", output_dir=str(place), **fields)
        before = again.step
        again.wait()
        assert (again.losses, again.validation_losses, content(engine, "a"), again.trained_tokens) == expected
        assert [e.number for e in read_events(place)] == list(range(len(again.events())))
        resumed.append(before)
    assert len(set(resumed)) > 1


def test_a_checkpoint_that_waited_for_the_disk_is_of_its_own_step(engine, tmp_path, undisturbed):
    """The job went on meanwhile: by another step, and by the validation of the step that is saved."""
    fields = {**JOB, "save_steps": 2, "validation_fraction": 0.3, "eval_steps": 2}
    job, opened = (
        engine.finetune(examples(1), adapter="a", output_dir=str(tmp_path / "job"), **fields),
        threading.Event(),
    )
    job._job.folder._checkpoints._saver.submit(opened.wait)
    until(engine, lambda: job.step == 5)
    opened.set()
    wait([engine.core.trainer.trainings[job.id].saving])  # of step 2; that of step 4 is due
    until(engine, lambda: any(event.kind == "checkpoint" and event.data["step"] == 4 for event in job.events()))
    name = "checkpoints/step-0000000004"
    shutil.copytree(tmp_path / "job" / name, tmp_path / "copy" / name)
    shutil.copy(tmp_path / "job" / "events.jsonl", tmp_path / "copy")
    job.wait()
    again = engine.finetune(examples(1), adapter="a", output_dir=str(tmp_path / "copy"), **fields)
    assert again.step == 4
    again.wait()
    assert (again.losses, again.validation_losses, content(engine, "a")) == undisturbed
    noted = [event.data["step"] for event in again.events() if event.kind == "validation"]
    assert noted == [0, 2, 4, 6]


def test_the_directory_says_what_became_of_the_job(engine, tmp_path):
    job = engine.finetune(examples(1), adapter="a", output_dir=str(tmp_path / "job"), save_steps=2, **JOB).wait()
    told = read_job(tmp_path / "job")
    assert (told["status"], told["step"], told["id"], told["adapter"]) == ("succeeded", 6, job.id, "a")
    assert told["loss"] == job.losses[-1]
    assert read_events(tmp_path / "job") == job.events()
    saved = load_peft(tmp_path / "job" / "adapter", engine.model, base_digest=engine.base_digest)
    assert saved.digest == engine.adapters.get("a").weights.fetched.digest
    steps = sorted(path.name for path in (tmp_path / "job" / "checkpoints").glob("step-*"))
    assert steps[-1] == "step-0000000006"
    assert len(steps) <= 2  # save_total_limit; one that was not begun when a newer one came is left out


def test_a_job_that_is_over_is_over_when_it_is_begun_again(engine, tmp_path):
    fields = {**JOB, "output_dir": str(tmp_path / "job")}
    first = engine.finetune(examples(1), adapter="a", **fields).wait()
    trained = content(engine, "a")
    again = engine.finetune(examples(1), adapter="a", **fields).wait()
    assert (again.status, again.id, again.losses) == ("succeeded", first.id, first.losses)
    assert content(engine, "a") == trained


def test_a_damaged_checkpoint_is_passed_over_and_the_job_says_so(engine, tmp_path, undisturbed):
    fields = {**JOB, "validation_fraction": 0.3, "eval_steps": 2, "save_steps": 3, "output_dir": str(tmp_path / "job")}
    engine.finetune(examples(1), adapter="a", **fields).wait()
    newest = tmp_path / "job" / "checkpoints" / "step-0000000006"
    (newest / "job.json").write_bytes(b"{}")
    job = engine.finetune(examples(1), adapter="a", **fields)
    assert job.step == 3
    warnings = [event.message for event in job.events() if event.kind == "warning"]
    assert warnings == ["checkpoint 6 is passed over: 'job.json' is not what was written"]
    job.wait()
    assert (job.losses, job.validation_losses) == undisturbed[:2]


def test_another_job_does_not_go_on_from_these_checkpoints(engine, tmp_path):
    fields = {**JOB, "output_dir": str(tmp_path / "job"), "max_steps": 2}
    engine.finetune(examples(1), adapter="a", **fields).wait()
    others = [
        ({"learning_rate": 1e-3}, examples(1), "a", "config"),
        ({}, examples(2), "a", "data"),
        ({}, examples(1), "b", "adapter"),
    ]
    for change, data, name, field in others:
        with pytest.raises(CheckpointMismatch) as refused:
            engine.finetune(data, adapter=name, **fields | change)
        assert refused.value.fields == [field]
    again = engine.finetune(examples(1), adapter="a", **fields | {"save_steps": 1}).wait()  # housekeeping may change
    assert again.status == "succeeded"


def test_a_job_goes_on_from_the_start_that_it_had(engine, tmp_path):
    """Scaling, ranks and modules are those of the start: with others its arrays would mean something else."""
    tiny_adapters.write_adapter(tmp_path / "start", engine.model, r=4, lora_alpha=64, target_modules="all-linear")
    fields = {**JOB, "output_dir": str(tmp_path / "job"), "max_steps": 2}
    engine.finetune(examples(1), adapter="a", start=str(tmp_path / "start"), **fields).wait()
    with pytest.raises(CheckpointMismatch, match="checkpoint 2: start 'init' has other modules, ranks or scaling"):
        engine.finetune(examples(1), adapter="a", **fields)
    again = engine.finetune(examples(1), adapter="a", start=str(tmp_path / "start"), **fields).wait()
    assert again.status == "succeeded"


def test_weight_decay_changes_no_layer_that_the_adapter_leaves_alone(engine, tmp_path):
    """What is served is what is saved, and a saved (IA)3 adapter has no scales of such layers."""
    job = engine.finetune(
        examples(1), adapter="a", method="ia3", target_modules=r".*layers\.1\.(self_attn\.v_proj|mlp\.down_proj)",
        weight_decay=0.5, learning_rate=1e-2, batch_size=3, max_steps=4,
    ).wait()  # fmt: skip
    job.save(tmp_path / "saved")
    engine.load_adapter("saved", tmp_path / "saved")
    params = jaxserve.SamplingParams(max_tokens=1, prompt_logprobs=0)
    trained, saved = (engine.generate([list(range(20))], params, adapter=name)[0] for name in ("a", "saved"))
    assert trained.prompt_logprobs == saved.prompt_logprobs


def test_two_jobs_do_not_share_a_directory_or_a_name(engine, tmp_path):
    fields = {**JOB, "output_dir": str(tmp_path / "job"), "max_steps": 50}
    job = engine.finetune(examples(1), adapter="a", **fields)
    with pytest.raises(CheckpointError, match="job/checkpoints: another process writes"):
        engine.finetune(examples(1), adapter="b", **fields)
    with pytest.raises(jaxserve.InvalidRequest, match="being trained by another job"):
        engine.finetune(examples(1), adapter="a", **JOB)
    job.cancel()
    assert read_job(tmp_path / "job")["status"] == "cancelled"


def test_a_paused_job_gives_everything_back_and_goes_on_as_if_nothing_had_been(engine, undisturbed):
    losses, _, trained = undisturbed
    rng = np.random.default_rng(3)
    job = engine.finetune(examples(1), adapter="a", validation_fraction=0.3, eval_steps=2, **JOB)
    other = None
    while not job._job.done:
        for _ in range(rng.integers(1, 6)):
            engine.step()
        if job._job.done:
            break
        job.pause()
        assert job.status == "paused"
        engine.run()
        engine.core.pool.check([])
        assert engine.core.residency.counts().num_refs == 0
        if other is None:  # the only lane is free for another job
            other = engine.finetune(examples(8), adapter="other", **{**JOB, "max_steps": 2}).wait()
            assert other.status == "succeeded"
        job.resume()
    assert job.losses == losses
    assert content(engine, "a") == trained
    with pytest.raises(jaxserve.EngineError, match="it cannot be paused"):
        job.pause()
    with pytest.raises(jaxserve.EngineError, match="it cannot be resumed"):
        job.resume()


def test_a_paused_job_is_not_resumed_to_wait_for_what_open_adapters_keep(engine):
    job = engine.finetune(examples(1), adapter="a", **JOB)
    job.pause()
    engine.open_adapter("b", rank=4)
    with pytest.raises(jaxserve.EngineError, match="cannot be resumed: max_finetune_jobs is 1, and as many adapters"):
        job.resume()
    assert job.status == "paused"
    engine.close_adapter("b")
    job.resume()
    assert job.wait().status == "succeeded"


@pytest.mark.parametrize("steps", [0, 1, 4, 6])
def test_of_a_call_that_ctrl_c_ends_nothing_stays(engine, monkeypatch, steps):
    """Neither in the gradients, to which it would be added once more, nor of a call before it too little."""
    kept, stopped = ([(prompt, None) for prompt in requests(seed)] for seed in (1, 2))
    with monkeypatch.context() as patch:
        patch.setattr(engine, "drive", _interrupted(engine.drive, 0))
        with pytest.raises(KeyboardInterrupt):
            engine.open_adapter("b", rank=4)
    engine.open_adapter("b", rank=4)
    engine.forward_backward("b", kept)
    expected = engine.optim_step("b", learning_rate=0.0)["gradient_norm"]
    engine.forward_backward("b", kept)
    for call in (engine.forward_backward, engine.forward):
        with monkeypatch.context() as patch:
            patch.setattr(engine, "drive", _interrupted(engine.drive, steps))
            with pytest.raises(KeyboardInterrupt):
                call("b", stopped)
    session = engine._calls.sessions["b"]
    assert not session._awaited
    assert not session._results
    assert engine.optim_step("b", learning_rate=0.0)["gradient_norm"] == pytest.approx(expected, rel=1e-5)
    engine.close_adapter("b")


def _interrupted(drive, steps):
    left = iter([drive] * steps)

    def interrupted():
        next(left, _interrupt)()

    return interrupted


def _interrupt():
    raise KeyboardInterrupt


def test_a_pause_that_is_taken_back_at_once_changes_nothing(engine, undisturbed):
    losses, _, trained = undisturbed
    job = engine.finetune(examples(1), adapter="a", validation_fraction=0.3, **JOB)
    job.pause()
    job.resume()
    rng = np.random.default_rng(4)
    while not job._job.done:
        engine.step()
        if not job._job.done and rng.random() < 0.2:  # each takes back what has not begun its backward
            job.pause()
            job.resume()
    assert job.losses == losses
    assert content(engine, "a") == trained


def test_a_pause_taken_back_while_the_newest_version_has_no_place_trains_on_no_older_one(
    engine, undisturbed, monkeypatch
):
    losses, _, trained = undisturbed
    job = engine.finetune(examples(1), adapter="a", validation_fraction=0.3, **JOB)
    until(engine, lambda: job.step == 2)
    with monkeypatch.context() as full:
        full.setattr(engine.core.residency, "try_acquire", lambda version: False)
        until(engine, lambda: not engine.core.trainer.trainings[job.id].resident)
        job.pause()
        job.resume()
        for _ in range(8):
            engine.step()
    job.wait()
    assert job.losses == losses
    assert content(engine, "a") == trained


def test_updates_while_the_bank_has_no_room_are_trained_on_once_it_has(engine, monkeypatch):
    engine.open_adapter("b", rank=4)
    with monkeypatch.context() as full:
        full.setattr(engine.core.residency, "try_acquire", lambda version: False)
        for _ in range(2):
            engine.optim_step("b")
    engine.optim_step("b")
    engine.forward_backward("b", [(requests(1)[0], None)])
    engine.close_adapter("b")


def test_a_job_that_comes_while_the_loop_looks_for_work_does_not_disturb_it(engine, monkeypatch):
    """The loop does so between steps, where other threads may add jobs."""
    trainings = {}

    class Waiting(SimpleNamespace):
        @property
        def unread(self):
            trainings["late"] = self
            return []

    still = {"saving": None, "saver": None, "pausing": False, "ending": False}
    trainings["early"] = Waiting(job=SimpleNamespace(status=trainer.JobStatus.PAUSED), **still)
    monkeypatch.setattr(engine.core.trainer, "trainings", trainings)
    assert not engine.core.trainer.has_work()


def test_closing_pauses_only_jobs_that_cannot_end_meanwhile(engine, monkeypatch):
    """As in the step of another thread."""
    free, pause = [], jaxserve.FinetuneJob.pause

    def is_free():
        return engine.core.lock.acquire(blocking=False) and engine.core.lock.release() is None

    def paused(job):
        with ThreadPoolExecutor(1) as other:
            free.append(other.submit(is_free).result())
        pause(job)

    monkeypatch.setattr(jaxserve.FinetuneJob, "pause", paused)
    engine.finetune(examples(1), adapter="a", **JOB)
    engine.close()
    assert free == [False]


def test_a_closed_engine_leaves_a_jobs_directory_to_whoever_begins_it_again(engine, tmp_path, undisturbed):
    fields = {**JOB, "output_dir": str(tmp_path / "job"), "validation_fraction": 0.3, "eval_steps": 2}
    job = engine.finetune(examples(1), adapter="a", **fields)
    until(engine, lambda: job.step == 2)
    for _ in range(2):
        engine.close()
    with pytest.raises(jaxserve.EngineError, match="cannot be resumed: its directory was closed; begin it again"):
        job.resume()
    job.cancel()
    assert read_job(tmp_path / "job")["status"] == "paused"
    assert engine.finetune(examples(1), adapter="a", **fields).wait().losses == undisturbed[0]


def test_a_pause_while_the_end_is_written_leaves_the_job_done(engine, tmp_path, undisturbed):
    fields = {**JOB, "output_dir": str(tmp_path / "job"), "validation_fraction": 0.3, "eval_steps": 2}
    job = engine.finetune(examples(1), adapter="a", **fields)
    training = engine.core.trainer.trainings[job.id]
    until(engine, lambda: training.saver._final is not None)
    job.pause()
    engine.run()
    assert job.status == "succeeded"
    assert job.losses == undisturbed[0]
    assert as_bytes(load_peft(tmp_path / "job" / "adapter", engine.model)) == undisturbed[2]


def test_closing_the_engine_saves_what_was_read_last(engine, tmp_path, undisturbed):
    fields = {**JOB, "output_dir": str(tmp_path / "job"), "validation_fraction": 0.3, "eval_steps": 2}
    job = engine.finetune(examples(1), adapter="a", **fields)
    until(engine, lambda: job.step == 3)
    job.pause()
    engine.run()
    done = job.step
    job.checkpoint()
    job.cancel()
    again = engine.finetune(examples(1), adapter="a", **fields)
    assert again.step == done > 2
    assert again.events()[-1].message == f"resumed from the checkpoint of step {done}/6"
    again.wait()
    assert again.losses == undisturbed[0]
    assert content(engine, "a") == undisturbed[2]


def test_a_checkpoint_that_is_asked_for_is_on_the_disk_behind_one_that_was_being_written(engine, tmp_path):
    job, opened = (
        engine.finetune(examples(1), adapter="a", output_dir=str(tmp_path), **JOB | {"save_steps": 1}),
        threading.Event(),
    )
    job._job.folder._checkpoints._saver.submit(opened.wait)
    until(engine, lambda: job.step == 3)
    threading.Timer(0.1, opened.set).start()
    job.checkpoint()
    assert newest(tmp_path / "checkpoints").step == 3


def test_a_full_disk_pauses_the_job_and_serving_goes_on(engine, tmp_path, monkeypatch, undisturbed):
    monkeypatch.setattr(saver, "RETRY_SECONDS", 0.2)
    fields = {**JOB, "output_dir": str(tmp_path / "job"), "save_steps": 2, "validation_fraction": 0.3, "eval_steps": 2}
    job = engine.finetune(examples(1), adapter="a", **fields)
    faults.arm("ckpt.before_fsync=ENOSPC@1")

    def paused():  # the disk's answer must not come after the job's end
        wait([t.saving for t in engine.core.trainer.trainings.values() if t.saving is not None])
        return job.status == "paused"

    until(engine, paused)
    assert any("No space left" in event.message for event in job.events())
    assert engine.generate([requests(1)[0]], jaxserve.SamplingParams(max_tokens=4))[0].finish_reason == "length"
    engine.open_adapter("b", rank=4)  # has the only lane when the disk takes the checkpoint
    deadline = time.monotonic() + 120
    while job.status == "paused" and time.monotonic() < deadline:
        engine.step()
    assert [event.message for event in job.events()][-2:] == [
        "resumed",
        "the job waits until an adapter is closed: max_finetune_jobs is 1, and as many adapters are open",
    ]
    engine.close_adapter("b")
    while not job._job.done and time.monotonic() < deadline:
        engine.step()
    assert job.status == "succeeded"
    assert job.losses == undisturbed[0]


@pytest.mark.parametrize("point", ["job.before_adapter", "job.after_adapter"])
def test_an_adapter_that_cannot_be_written_is_tried_again(engine, tmp_path, monkeypatch, point):
    monkeypatch.setattr(saver, "RETRY_SECONDS", 0.05)
    faults.arm(f"{point}=EIO@1")
    job = engine.finetune(examples(1), adapter="a", output_dir=str(tmp_path / "job"), **JOB).wait()
    assert job.status == "succeeded"
    assert any("the adapter was not written" in event.message for event in job.events())
    assert as_bytes(load_peft(tmp_path / "job" / "adapter", engine.model)) == content(engine, "a")


def test_a_job_that_the_host_has_no_room_for_fails_and_serving_goes_on(engine, monkeypatch):
    engine.generate([[1, 2, 3]])
    monkeypatch.setattr(engine.adapters, "_max_host_adapters", 0)
    job = engine.finetune(examples(1), adapter="one-too-many", **JOB).wait()
    assert (job.status, job.error) == (
        "failed",
        "host store is full: max_host_adapters 0, all of them in use or unsaved",
    )
    with pytest.raises(jaxserve.InvalidRequest, match="'two-too-many' was not opened: host store is full"):
        engine.open_adapter("two-too-many", rank=4)
    assert engine.generate([[1, 2, 3]])[0].token_ids


# failing steps


def break_steps(monkeypatch, broken):
    """Makes the device fail at these calls of the step, after it has taken the state."""
    real, calls = programs.step, []

    def step(*args, spec):
        calls.append(spec.layout.bucket)
        state, output = real(*args, spec=spec)
        if broken(len(calls) - 1, spec.layout.bucket):
            raise RuntimeError("the device is on fire")
        return state, output

    monkeypatch.setattr(programs, "step", step)
    return calls


@pytest.mark.parametrize("when", [{0}, {3}, {4, 5}, {2, 12}])
def test_a_failed_step_costs_a_job_nothing_but_time(engine, monkeypatch, undisturbed, when, caplog):
    params = jaxserve.SamplingParams(max_tokens=10, temperature=0.0)
    alone = [o.token_ids for o in engine.generate(requests(5, 4), params)]
    calls = break_steps(monkeypatch, lambda number, bucket: number in when)
    job = engine.finetune(examples(1), adapter="a", validation_fraction=0.3, eval_steps=2, **JOB)
    assert [o.token_ids for o in engine.generate(requests(5, 4), params)] == alone
    job.wait()
    assert len(calls) > max(when)
    assert (job.losses, job.validation_losses) == undisturbed[:2]
    assert content(engine, "a") == undisturbed[2]


def test_a_step_made_again_is_served_and_trained_on_as_it_was_made_the_second_time(engine, monkeypatch, undisturbed):
    """Steps fail that have taken the version of an optimizer step which nobody has read, and never will."""
    failed = [-9]

    def broken(number, bucket):
        unread = any(training.unread for training in engine.core.trainer.trainings.values())
        if unread and number > failed[-1] + 5 and len(failed) < 4:
            failed.append(number)
            return True
        return False

    break_steps(monkeypatch, broken)
    job = engine.finetune(examples(1), adapter="a", validation_fraction=0.3, eval_steps=2, **JOB).wait()
    assert len(failed) == 4
    assert (job.losses, job.validation_losses) == undisturbed[:2]
    assert content(engine, "a") == undisturbed[2]


def test_tokens_of_batches_that_are_made_again_count_once(engine, monkeypatch, caplog):
    calls = break_steps(monkeypatch, lambda number, bucket: number in {4, 9})
    job = engine.finetune(examples(1), adapter="a", **JOB)
    run = Replay(engine, NOBODY, {"a": job})()
    assert len(calls) > 9
    assert run.finetune_tokens == job.trained_tokens > 0


def test_a_version_of_a_cancelled_job_outlives_the_failure_of_its_unread_step(engine, monkeypatch, caplog):
    job = engine.finetune(examples(1), adapter="a", **JOB)
    training = engine.core.trainer.trainings[job.id]
    until(engine, lambda: job.step >= 1 and training.unread)
    with monkeypatch.context() as patch:
        break_steps(patch, lambda number, bucket: number == 0)
        job.cancel()
        assert engine.generate([[1, 2, 3]], adapter="a")[0].adapter_version == training.version.version
    read = weights_of(training.read.masters, training.job.start)
    assert content(engine, "a") == as_bytes(read) != as_bytes(weights_of(training.now.masters, training.job.start))


def test_a_job_whose_steps_always_fail_is_given_up_and_serving_goes_on(engine, monkeypatch, caplog):
    params = jaxserve.SamplingParams(max_tokens=10, temperature=0.0)
    alone = [o.token_ids for o in engine.generate(requests(5, 4), params)]
    with monkeypatch.context() as patch:
        break_steps(patch, lambda number, bucket: bucket.grad_rows > 0)
        job = engine.finetune(examples(1), adapter="a", **JOB)
        assert [o.token_ids for o in engine.generate(requests(5, 4), params)] == alone
        job.wait()
    assert job.status == "failed"
    assert "failed 3 times in a row with windows of this job" in job.error
    assert engine.finetune(examples(1), adapter="b", **JOB).wait().status == "succeeded"


def test_numbers_that_are_not_finite_are_not_applied_twice_tried_and_then_the_job_fails(engine, monkeypatch, tmp_path):
    real, seen = trainer.Trainer.commit, []

    def commit(self, plan, output, finite, chunk_rows):
        numbers = {self.queue.owner[w.seq][1].number for w in plan.grads if w.seq in self.queue.owner}
        if numbers & sick:
            seen.extend(numbers & sick)
            output = output.replace(loss_W=np.full_like(np.asarray(output.loss_W), np.nan))
        return real(self, plan, output, finite, chunk_rows)

    monkeypatch.setattr(trainer.Trainer, "commit", commit)
    sick = {3}
    fields = {**JOB, "output_dir": str(tmp_path / "job"), "save_steps": 1, "batch_size": 1}
    job = engine.finetune([([1, 2, 3, 4, 5], None)] * 4, adapter="a", **fields).wait()
    assert (job.status, job.error) == ("failed", "loss or gradient of step 3 is not finite, twice")
    assert len(seen) == 2
    told = read_job(tmp_path / "job")
    assert (told["status"], told["error"]) == ("failed", job.error)
    kept = sorted(path.name for path in (tmp_path / "job" / "checkpoints").glob("step-*"))
    assert "step-0000000002" in kept
    assert json.loads((tmp_path / "job" / "job.json").read_text())["step"] == job.step
