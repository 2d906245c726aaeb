"""A finetuning job is PEFT and torch, step for step: same start, same batches, same losses, same adapter."""

import numpy as np
import pytest
import tiny_models

import jaxserve
from jaxserve.adapters.peft_io import load_peft, save_peft
from jaxserve.finetune.data import Cursor

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

STEPS, BATCH = 100, 3
JOB = {
    "learning_rate": 3e-3, "weight_decay": 0.01, "batch_size": BATCH, "max_steps": STEPS,
    "schedule": "cosine", "warmup_steps": 4, "seed": 3,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """For so small a model others only wait, and for long where another process is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
            ids = torch.tensor(example.token_ids, dtype=torch.long)[None]
            logprob = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            loss = -(logprob * torch.tensor(example.weights[1:])).sum() / total
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
        ("llama", "lora", None),
        pytest.param("llama", "rslora", 0, marks=pytest.mark.slow),
        pytest.param("qwen2", "dora", 0, marks=pytest.mark.slow),
        pytest.param("llama", "dora", None, marks=pytest.mark.slow),
        ("qwen2", "ia3", 0),
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
    engine = jaxserve.Engine.from_pretrained(
        path, dtype="float32", max_model_len=96, max_num_seqs=2, max_num_batched_tokens=32, block_size=16,
        max_loras=3, max_lora_rank=16, finetune_window=32, finetune_stash_tokens=stash,
    )  # fmt: skip
    job = engine.finetune(examples(rng), adapter="a", method=method, **METHODS[method], **JOB)
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
    ids = torch.tensor([prompt])
    expected = served(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].detach().numpy()
    found = [entry[token] for entry, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)]
    np.testing.assert_allclose(found, expected, atol=1e-4)
