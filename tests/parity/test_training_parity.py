"""Training is torch's autograd through PEFT: by calls, for every loss, and by a job step for step: same start, same
batches, same losses, same adapter."""

import itertools
import threading
import time

import numpy as np
import pytest
import serving
import tiny_models

import jaxserve
from jaxserve.adapters.peft_io import load_peft, save_peft
from jaxserve.engine import programs
from jaxserve.finetune.data import Cursor

pytestmark = pytest.mark.quick_compiles

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

SIZES = {
    "dtype": "float32", "max_model_len": 96, "max_num_seqs": 4, "max_num_batched_tokens": 16, "block_size": 16,
    "max_loras": 4, "max_lora_rank": 16, "finetune_window": 16, "max_finetune_jobs": 1, "num_kv_pages": 48,
}  # fmt: skip
PLAIN_SGD = {"optimizer": "sgd", "momentum": 0.0, "learning_rate": 1.0, "max_grad_norm": None}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_models.build(tmp_path_factory.mktemp("model") / "m", "llama", tokenizer=False)


@pytest.fixture(scope="module")
def prepared(path):
    """An engine that is asked to finetune when it is running, and what it compiled then in the way of its loop."""
    engine = jaxserve.Engine.from_pretrained(path, **SIZES | {"max_finetune_jobs": 0})
    with pytest.MonkeyPatch.context() as patch:
        compiled = serving.count_compilations(patch, engine.core, "_try_all")
        engine.prepare_finetuning()
    return engine, compiled


@pytest.fixture(scope="module")
def engine(prepared):
    return prepared[0]


def test_the_first_job_of_a_running_engine_compiles_nothing_in_the_loop(prepared):
    engine, compiled = prepared
    assert compiled == {"_try_all": 0}
    assert engine.stats()["recompiles"] == 0
    trainer = engine.core.trainer  # as of two first jobs at a time, each on a thread
    assert engine.core.enable_training(engine.adapters, 1) == {}
    assert engine.core.trainer is trainer


@pytest.fixture
def opened(engine, path, tmp_path):
    """An adapter whose B is not zero, open for training, and the same in PEFT."""
    config = {"rank": 4, "alpha": 8, **PLAIN_SGD}
    engine.open_adapter("a", **config, seed=3)
    rng = np.random.default_rng(0)
    engine.forward_backward("a", [(rng.integers(0, 300, 30).tolist(), None)])
    engine.optim_step("a", learning_rate=0.5)
    save_peft(engine.adapters.get("a").weights.fetched, tmp_path / "start")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    yield peft.PeftModel.from_pretrained(base, tmp_path / "start", is_trainable=True)
    engine.close_adapter("a")


def datums(rng, count=3):
    made = []
    for length in rng.integers(5, 80, count):
        made.append(
            {
                "input_ids": rng.integers(0, 300, int(length)).tolist(),
                "weights": (rng.random(int(length)) * (rng.random(int(length)) < 0.8)).astype(np.float32).tolist(),
                "logprobs": (-6 + rng.normal(size=int(length)) * 0.5).tolist(),
                "advantages": rng.normal(size=int(length)).tolist(),
            }
        )
    return made


def logprobs_of(model, ids):
    logits = model(torch.tensor([ids])).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids)[1:, None])[:, 0]


def torch_loss(model, datum, loss, clip):
    p = logprobs_of(model, datum["input_ids"])
    w, q, a = (torch.tensor(datum[k][1:]) for k in ("weights", "logprobs", "advantages"))
    ratio = (p - q).exp()
    if loss == "cross_entropy":
        return -(w * p).sum()
    if loss == "importance_sampling":
        return -(w * ratio * a).sum()
    return -(w * torch.minimum(ratio * a, ratio.clamp(*clip) * a)).sum()


def assert_updated_by(engine, model, before, tmp_path):
    """Our step of rate 1 has moved every factor by torch's gradient."""
    applied = engine.optim_step("a")
    assert applied["applied"]
    after = engine.adapters.get("a").weights.fetched
    model.save_pretrained(tmp_path / "names")  # for PEFT's names of its parameters
    norms = 0.0
    for (layer, member), pair in after.pairs.items():
        module = model.base_model.model.model.layers[layer]
        module = getattr(module.self_attn if member[0] in "qkvo" else module.mlp, member)
        for name, new, old in (
            ("a", pair.a, before.pairs[layer, member].a),
            ("b", pair.b, before.pairs[layer, member].b),
        ):
            gradient = getattr(module, f"lora_{name.upper()}")["default"].weight.grad.numpy()
            norms += float((gradient.astype(np.float64) ** 2).sum())
            assert np.linalg.norm(old - new - gradient) <= 2e-4 * np.linalg.norm(gradient) + 1e-6, (layer, member, name)
    assert applied["gradient_norm"] == pytest.approx(norms**0.5, rel=1e-4)


@pytest.mark.parametrize("loss", ["cross_entropy", "importance_sampling", "ppo"])
def test_gradients_of_token_losses_are_torchs(engine, opened, tmp_path, loss):
    rng, before, clip = np.random.default_rng(5), engine.adapters.get("a").weights.fetched, (0.7, 1.1)
    masked = {**datums(rng, 1)[0]}
    masked["weights"] = [0.0] * len(masked["input_ids"])
    batches = [datums(rng), [*datums(rng, 2), masked]]
    total = 0.0
    for batch in batches:  # two calls, one gradient
        result = engine.forward_backward("a", batch, loss, **({"clip": clip} if loss == "ppo" else {}))
        for datum, losses, logprobs in zip(batch, result.losses, result.logprobs, strict=True):
            value = torch_loss(opened, datum, loss, clip)
            value.backward()
            assert losses.sum() == pytest.approx(float(value.detach()), rel=1e-4, abs=1e-4)
            np.testing.assert_allclose(logprobs[1:], logprobs_of(opened, datum["input_ids"]).detach(), atol=1e-4)
            total += float(value.detach())
    assert total != 0
    assert_updated_by(engine, opened, before, tmp_path)


@pytest.mark.parametrize("given", [False, True])
def test_dpo_is_torchs(engine, opened, tmp_path, given):
    rng, before, beta = np.random.default_rng(6), engine.adapters.get("a").weights.fetched, 0.3
    pairs, total = [], 0.0
    for _ in range(3):
        prompt = rng.integers(0, 300, 10).tolist()
        sides = [prompt + rng.integers(0, 300, int(n)).tolist() for n in rng.integers(5, 60, 2)]
        weights = [[0.0] * 10 + [1.0] * (len(side) - 10) for side in sides]
        pair = {name: (s, w) for name, s, w in zip(("chosen", "rejected"), sides, weights, strict=True)}
        sums = [logprobs_of(opened, side)[9:].sum() for side in sides]
        with opened.disable_adapter(), torch.no_grad():
            reference = [logprobs_of(opened, side)[9:].sum() for side in sides]
        loss = -torch.nn.functional.logsigmoid(beta * ((sums[0] - sums[1]) - (reference[0] - reference[1])))
        loss.backward()
        total += float(loss.detach())
        pairs.append(pair | ({"reference_logprobs": [float(x) for x in reference]} if given else {}))
    result = engine.forward_backward("a", pairs, "dpo", beta=beta)
    assert result.loss == pytest.approx(total, rel=1e-4)
    assert 0 <= result.metrics["accuracy"] <= 1
    assert_updated_by(engine, opened, before, tmp_path)


def test_forward_alone_learns_nothing(engine, opened):
    batch = [{k: d[k] for k in ("input_ids", "weights")} for d in datums(np.random.default_rng(8))]
    result = engine.forward("a", batch)
    for datum, logprobs in zip(batch, result.logprobs, strict=True):
        np.testing.assert_allclose(logprobs[1:], logprobs_of(opened, datum["input_ids"]).detach(), atol=1e-4)
    before = engine.adapters.get("a").weights.fetched.digest
    assert engine.optim_step("a")["gradient_norm"] == 0
    assert engine.adapters.get("a").weights.fetched.digest == before


def test_a_batch_of_another_thread_waits_for_an_update(engine, opened, monkeypatch):
    trainer, session = engine.core.trainer, engine._calls.sessions["a"]
    is_under_way = trainer.is_under_way
    other = threading.Thread(target=engine.forward_backward, args=("a", [([1, 2, 3], None)]))

    def looked_at(job):
        found = is_under_way(job)
        if not found and other.ident is None:
            other.start()
            for _ in range(20):  # where nothing keeps it out, its batch is there before the update
                if session.idle:
                    time.sleep(0.01)
        return found

    monkeypatch.setattr(trainer, "is_under_way", looked_at)
    assert engine.optim_step("a")["gradient_norm"] == 0
    other.join()
    assert engine.optim_step("a")["gradient_norm"] > 0


def test_an_update_clips_as_it_is_told_and_by_default_as_the_config_says(engine):
    lengths = []
    for limit in (None, 1e-2, np.float32(np.inf)):
        engine.open_adapter("c", rank=4, **PLAIN_SGD | {"max_grad_norm": 1e-3})
        before = engine.adapters.get("c").weights.fetched
        engine.forward_backward("c", [([1, 2, 3], None)])
        norm = engine.optim_step("c", max_grad_norm=limit)["gradient_norm"]
        after = engine.adapters.get("c").weights.fetched
        change = [after.pairs[key].b - before.pairs[key].b for key in before.pairs]  # a has no gradient: b is zero
        lengths.append(float(np.sqrt(sum((b.astype(np.float64) ** 2).sum() for b in change))))
        engine.close_adapter("c")
    assert norm > 1e-2
    assert lengths == pytest.approx([1e-3, 1e-2, norm], rel=1e-3)


def test_the_weights_of_a_moment_can_be_published_under_another_name(engine, opened):
    params = jaxserve.SamplingParams(max_tokens=8, temperature=0.0)
    engine.put_adapter("then", engine.adapters.get("a").weights)
    before, then = (
        engine.sample([[5, 6, 7]] * 2, params, adapter="a"),
        engine.sample([[5, 6, 7]], params, adapter="then"),
    )
    assert serving.bits(before[0]) == serving.bits(then[0])
    engine.forward_backward("a", [([5, 6, 7, 8], None)])
    engine.optim_step("a", learning_rate=0.1)
    assert serving.bits(engine.sample([[5, 6, 7]], params, adapter="a")[0]) != serving.bits(before[0])
    assert serving.bits(engine.sample([[5, 6, 7]], params, adapter="then")[0]) == serving.bits(before[0])
    engine.unload_adapter("then")


def test_what_another_thread_closes_ends_with_that(engine):
    def closed_while(call):
        errors = []

        def attempt():
            try:
                call()
            except jaxserve.InvalidRequest as error:
                errors.append(str(error))

        with engine._next, engine._stepping:  # it waits in the middle
            other = threading.Thread(target=attempt)
            other.start()
            while not (session := engine._calls.sessions.get("d")) or (session.status == "running" and session.idle):
                time.sleep(0.01)
            engine.close_adapter("d")
        other.join()
        return errors

    assert closed_while(lambda: engine.open_adapter("d", rank=4)) == ["adapter 'd' was not opened: it was closed"]
    engine.open_adapter("d", rank=4)
    batch = [([1, 2, 3], None)]
    assert closed_while(lambda: engine.forward_backward("d", batch)) == [
        "training of adapter 'd' has ended: it was closed"
    ]


def test_the_trainers_log_probabilities_are_the_samplers(engine, opened):
    """Sampled tokens, taken in again by the trainer: the same kernels and version, so (on CPU) the same bits."""
    rng = np.random.default_rng(9)
    prompts = [rng.integers(0, 300, int(n)).tolist() for n in rng.integers(3, 40, 6)]
    params = jaxserve.SamplingParams(max_tokens=40, temperature=1.0, seed=4, ignore_eos=True)
    outputs = engine.sample(prompts, params, adapter="a")
    data = [(o.prompt_token_ids + o.token_ids, None) for o in outputs]
    largest = 0.0
    for call in (engine.forward, engine.forward_backward):
        for output, logprobs in zip(outputs, call("a", data).logprobs, strict=True):
            sampled = [entry[token] for entry, token in zip(output.logprobs, output.token_ids, strict=True)]
            largest = max(largest, float(np.abs(np.array(sampled) - logprobs[len(output.prompt_token_ids) :]).max()))
    assert largest == 0.0
    assert len({o.adapter_version for o in outputs}) == 1


def test_a_saved_state_goes_on_bit_by_bit(engine, tmp_path):
    rng = np.random.default_rng(10)
    batches = [datums(rng) for _ in range(4)]
    config = {"rank": 4, "alpha": 8, "optimizer": "adamw", "learning_rate": 1e-2, "dropout": 0.2}

    def run(upto):
        for batch in batches[:upto]:
            engine.forward_backward("b", batch)
            if batch is not batches[2]:  # the third stays in the gradients
                engine.optim_step("b")

    def finish():
        engine.forward_backward("b", batches[3])
        engine.optim_step("b")
        weights = engine.adapters.get("b").weights.fetched
        engine.close_adapter("b")
        return weights.digest

    engine.open_adapter("b", **config)
    run(3)
    engine.save_state("b", tmp_path / "state")
    engine.save_state("b", tmp_path / "state")
    expected = finish()

    engine.open_adapter("b", **config)
    engine.load_state("b", tmp_path / "state")
    assert finish() == expected

    engine.open_adapter("c", start=str(tmp_path / "state"), **config)
    assert engine.adapters.get("c").weights.fetched.rank == 4
    engine.close_adapter("c")

    engine.open_adapter("b", **config | {"rank": 5})
    with pytest.raises(RuntimeError, match="adapter_config is"):
        engine.load_state("b", tmp_path / "state")
    with pytest.raises(jaxserve.InvalidRequest, match="no saved state"):
        engine.load_state("b", tmp_path / "nothing")
    for number in range(9):
        (tmp_path / f"foreign{number}").touch()
        (tmp_path / "state" / f"foreign{number}").touch()
    with pytest.raises(jaxserve.InvalidRequest, match=r"'foreign0' is no checkpoint.*'foreign2'.*; and 7 more$"):
        engine.load_state("b", tmp_path)
    (saved,) = (tmp_path / "state").glob("step-*/job.json")
    saved.write_bytes(saved.read_bytes()[:-1])
    with pytest.raises(
        jaxserve.InvalidRequest, match=r"no saved state.*; checkpoint 1 is passed over: 'job.json' is not"
    ):
        engine.load_state("b", tmp_path / "state")
    engine.close_adapter("b")


@pytest.mark.parametrize("failing", [(1,), (9,), (10, 11), (11, 13), (14, 15)], ids=str)
def test_a_batch_that_failed_steps_take_back_is_summed_once(engine, monkeypatch, failing):
    batches = [datums(np.random.default_rng(seed)) for seed in (0, 1)]

    def gradient_norm(failing):
        calls, real = itertools.count(), programs.step

        def step(*args, spec):
            done = real(*args, spec=spec)
            if next(calls) in failing:
                raise RuntimeError("the device is gone")
            return done

        engine.open_adapter("again", rank=4, seed=1, deterministic=True)
        with monkeypatch.context() as patched:
            patched.setattr(programs, "step", step)
            for batch in batches:
                engine.forward_backward("again", batch)
            norm = engine.optim_step("again")["gradient_norm"]
        engine.close_adapter("again")
        return norm

    assert gradient_norm(failing) == gradient_norm(())


def test_exported_adapters_are_what_was_trained(engine, opened, tmp_path):
    save_peft(engine.adapters.get("a").weights.fetched, tmp_path / "a")
    assert load_peft(tmp_path / "a", engine.model).digest == engine.adapters.get("a").weights.fetched.digest


def test_wrong_calls_are_refused_and_change_nothing(engine, opened):
    good = {"input_ids": [1, 2, 3], "weights": [0, 1, 1]}
    wrong = [
        (lambda: engine.forward_backward("nobody", [good]), "not open for training"),
        (lambda: engine.forward_backward("a", []), "batch is empty"),
        (lambda: engine.forward_backward("a", [good], "hinge"), "loss is 'hinge'"),
        (lambda: engine.forward_backward("a", [good, {"input_ids": [1, 999]}]), r"batch\[1\]: token ids must be from"),
        (lambda: engine.forward_backward("a", [{"input_ids": [1]}]), r"batch\[0\]: fewer than two tokens"),
        (lambda: engine.forward_backward("a", [good], "ppo"), "must have input_ids, logprobs and advantages"),
        (
            lambda: engine.forward_backward("a", [{**good, "logprobs": [0, 1], "advantages": [1, 1, 1]}], "ppo"),
            r"batch\[0\]: logprobs must be 3 finite numbers",
        ),
        (lambda: engine.forward_backward("a", 5), "batch is a int"),
        (lambda: engine.forward_backward("a", good), "batch is a dict"),
        *(
            (
                lambda clip=clip: engine.forward_backward(
                    "a", [{**good, "logprobs": [0] * 3, "advantages": [1] * 3}], "ppo", clip=clip
                ),
                r"clip is .*; it must be \(low, high\)",
            )
            for clip in ((1.2, 0.8), ("a", "b"), 5, (True, True))
        ),
        (lambda: engine.forward_backward("a", [good], clip=(0.8, 1.2)), "clip is .*; loss cross_entropy has none"),
        (lambda: engine.forward_backward("a", [good], beta=0.1), "beta is 0.1; loss cross_entropy has none"),
        (
            lambda: engine.forward_backward("a", [good], "ppo", reference="b"),
            "reference is 'b'; loss ppo has none, it is of dpo",
        ),
        (lambda: engine.forward_backward("a", [good], "dpo", clip=(0.8, 1.2)), "loss dpo has none, it is of ppo"),
        (lambda: engine.forward_backward("a", [good], "dpo"), "must have chosen and rejected"),
        (
            lambda: engine.forward_backward(
                "a", [{"chosen": good, "rejected": good}, {"chosen": good, "rejected": {"input_ids": [999, 1]}}], "dpo"
            ),
            r"batch\[1\]: rejected: token ids must be from",
        ),
        (lambda: engine.forward_backward("a", [{"chosen": good, "rejected": good}], "dpo", beta=0), "beta is 0"),
        (lambda: engine.forward_backward("a", [{"chosen": good, "rejected": good}], "dpo", beta="x"), "beta is 'x'"),
        (lambda: engine.forward_backward("a", [{"chosen": good, "rejected": good}], "dpo", beta=True), "beta is True"),
        (
            lambda: engine.forward_backward(
                "a", [{"chosen": good, "rejected": {"input_ids": [1] * engine.config.max_model_len}}], "dpo"
            ),
            r"batch\[0\]: \d+ tokens, at most .* without reference_logprobs",
        ),
        *(
            (
                lambda sums=sums: engine.forward_backward(
                    "a", [{"chosen": good, "rejected": good, "reference_logprobs": sums}], "dpo"
                ),
                r"batch\[0\]: reference_logprobs must be two finite numbers",
            )
            for sums in ([-1.0], -1.0, [0, float("nan")], "ab", [1, 2, 3])
        ),
        *(
            (
                lambda name=name: engine.forward_backward(
                    "a", [{"chosen": good, "rejected": good}], "dpo", reference=name
                ),
                r"reference is .*; it must be the name of an adapter",
            )
            for name in (3, ["a", "a"], {})
        ),
        (lambda: engine.forward_backward(["a"], [good]), "not open for training"),
        (lambda: engine.optim_step("a", learning_rate=float("nan")), "learning_rate is nan"),
        (lambda: engine.optim_step("a", learning_rate=1e39), "learning_rate is 1e.39; .* from 0, at most 3.4e.38"),
        (lambda: engine.optim_step("a", eps=0), "eps is 0; it must be a number from 1.18e-38"),
        (lambda: engine.optim_step("a", max_grad_norm=0.0), "max_grad_norm is 0.0; .* from 1.18e-38.* or inf for no"),
        (lambda: engine.optim_step("a", max_grad_norm=1e39), "max_grad_norm is 1e.39"),
        (lambda: engine.optim_step("a", eps=float("inf")), "eps is inf"),
        (lambda: engine.optim_step("a", beta1=1.0), "beta1 is 1.0; it must be a number from 0, below 1"),
        (lambda: engine.optim_step("a", beta1=1 - 1e-9), "beta1 is 0.999999999; it must be a number from 0, below 1"),
        (lambda: engine.optim_step("a", beta2=2), "beta2 is 2; it must be a number from 0, below 1"),
        (lambda: engine.optim_step("a", momentum=True), "momentum is True"),
        (lambda: engine.optim_step("a", lr=1.0), "optim_step has no 'lr'"),
        *(
            (lambda call=call, path=path: call("a", path), r"directory is .*; it must be the path of a directory")
            for call in (engine.save_state, engine.load_state)
            for path in (3, None, b"a", "", "a\0")
        ),
        (lambda: engine.open_adapter("a", rank=4), "being trained"),
        (lambda: engine.open_adapter("c", rank=4), "max_finetune_jobs is 1"),
        (lambda: engine.finetune([([1, 2, 3], None)], "c"), "max_finetune_jobs is 1, and as many adapters are open"),
    ]
    for call, message in wrong:
        with pytest.raises(jaxserve.InvalidRequest, match=message):
            call()
    assert engine.optim_step("a")["gradient_norm"] == 0
    assert engine.stats()["recompiles"] == 0


# jobs

STEPS, BATCH = 100, 3
JOB = {
    "learning_rate": 3e-3, "weight_decay": 0.01, "batch_size": BATCH, "max_steps": STEPS,
    "schedule": "cosine", "warmup_steps": 4, "seed": 3,
}  # fmt: skip


def examples(rng):
    """Token ids and weights, some longer than a window, some weights zero."""
    made = []
    for length in (60, 12, 33, 90, 7, 45, 20):
        weights = (rng.random(length) < 0.8).astype(np.float32)
        weights[-1] = 1
        made.append((rng.integers(0, tiny_models.VOCAB_SIZE, length).tolist(), weights.tolist()))
    return made


def torch_losses(path, start, job):
    """The same job by PEFT and torch's AdamW."""
    from transformers import AutoModelForCausalLM
    from transformers.optimization import get_cosine_schedule_with_warmup

    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    model = peft.PeftModel.from_pretrained(base, start, is_trainable=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=JOB["learning_rate"], weight_decay=JOB["weight_decay"])
    schedule = get_cosine_schedule_with_warmup(optimizer, JOB["warmup_steps"], STEPS)
    losses, cursor = [], Cursor()
    for _ in range(STEPS):
        batch, cursor = job.dataset.batch(cursor, BATCH)
        total = sum(float(e.weights.sum()) for e in batch)
        optimizer.zero_grad()
        step_loss = 0.0
        for example in batch:
            loss = -(logprobs_of(model, example.token_ids.tolist()) * torch.tensor(example.weights[1:])).sum() / total
            loss.backward()
            step_loss += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(step_loss)
    return losses, model


ALL_MEMBERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
METHODS = {
    "lora": {"rank": 6, "alpha": 9, "target_modules": "all-linear"},
    "rslora": {"rank": 6, "alpha": 4, "target_modules": ["q_proj", "o_proj", "down_proj"]},
    "dora": {"rank": 6, "alpha": 9, "target_modules": "all-linear"},
    "ia3": {"target_modules": ALL_MEMBERS, "feedforward_modules": ["q_proj", "up_proj", "down_proj"]},
}


@pytest.mark.parametrize(
    ("family", "method", "stash"),  # tokens of it; None: the engine's own choice, which has one
    [
        ("llama", "lora", None),  # the other tests' programs
        pytest.param("llama", "rslora", 0, marks=pytest.mark.slow),
        pytest.param("qwen2", "dora", 0, marks=pytest.mark.slow),
        pytest.param("llama", "dora", None, marks=pytest.mark.slow),
        pytest.param("llama", "ia3", None, marks=pytest.mark.slow),
        pytest.param("qwen2", "ia3", 0, marks=pytest.mark.slow),
        pytest.param("mistral", "lora", 0, marks=pytest.mark.slow),
        pytest.param("qwen2", "lora", None, marks=pytest.mark.slow),
        pytest.param("qwen3", "lora", None, marks=pytest.mark.slow),
        pytest.param("gemma2", "lora", None, marks=pytest.mark.slow),
        pytest.param("gemma3", "lora", 0, marks=pytest.mark.slow),
        pytest.param("gemma3", "dora", None, marks=pytest.mark.slow),
    ],
)
def test_a_job_is_peft_step_for_step(tmp_path, family, method, stash):
    rng = np.random.default_rng(5)
    path = tiny_models.build(tmp_path / "model", family, tokenizer=False)
    config = jaxserve.FinetuneConfig(method=method, **METHODS[method], **JOB)
    engine = jaxserve.Engine.from_pretrained(path, **SIZES, finetune_stash_tokens=stash, jobs=[config])
    job = engine.finetune(examples(rng), adapter="a", config=config)
    start = tmp_path / "start"
    save_peft(job._job.start, start)
    job.wait()
    assert job.status == "succeeded"
    losses, model = torch_losses(path, start, job._job)
    np.testing.assert_allclose(job.losses, losses, rtol=1e-4)
    assert losses[-1] < 0.97 * losses[0]

    job.save(tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_peft(tmp_path / name, engine.model) for name in ("ours", "theirs"))
    for key, pair in theirs.pairs.items():
        for x, y in ((ours.pairs[key].a, pair.a), (ours.pairs[key].b, pair.b)):
            assert np.linalg.norm(x - y) <= 1e-3 * np.linalg.norm(y), key
    for key, vector in theirs.vectors.items():
        assert np.linalg.norm(ours.vectors[key].value - vector.value) <= 1e-3 * np.linalg.norm(vector.value), key

    # PEFT reads what we wrote, and computes what we serve
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    served = peft.PeftModel.from_pretrained(base, tmp_path / "ours")
    prompt = rng.integers(0, tiny_models.VOCAB_SIZE, 40).tolist()
    params = jaxserve.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    output = engine.generate([prompt], params, adapter="a")[0]
    expected = logprobs_of(served, prompt).detach().numpy()
    found = [entry[token] for entry, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)]
    np.testing.assert_allclose(found, expected, atol=1e-4)
