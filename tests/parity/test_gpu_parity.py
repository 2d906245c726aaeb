"""On a GPU, in bfloat16, with the kernels: as near to transformers and PEFT in float32 as torch's own bfloat16 is.

Run with ``JAX_PLATFORMS=cuda,cpu pytest -m gpu``.
"""

import numpy as np
import pytest
import tiny_adapters
import tiny_models
from test_training_parity import JOB, STEPS, examples, torch_losses

import jaxserve
from jaxserve.adapters.peft_io import load_peft, save_peft

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.gpu

SIZES = {
    "hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64,
    "max_position_embeddings": 512, "dtype": "bfloat16",
}  # fmt: skip
FAMILIES = {"llama": {}, "gemma2": {"sliding_window": 40}, "qwen3": {}}


def engine_of(path, **options):
    sizes = {"max_model_len": 320, "max_num_seqs": 8, "max_num_batched_tokens": 64, "finetune_window": 64}
    return jaxserve.Engine.from_pretrained(path, max_loras=3, max_lora_rank=16, **sizes | options)


def logprobs_of(model, token_ids):
    ids = torch.tensor([token_ids])
    with torch.no_grad():
        return model(ids).logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_served_log_probabilities_are_those_of_transformers(tmp_path, family):
    from transformers import AutoModelForCausalLM

    path = tiny_models.build(tmp_path / "model", family, tokenizer=False, **SIZES | FAMILIES[family])
    engine = engine_of(path)
    key = next(key for key in engine.core.specs if key[0].block_rows)
    assert "mosaic_gpu" in engine.core.programs._lower(key, engine.core._arrays()).as_text()
    adapter = tmp_path / "adapter"
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tiny_adapters.write_with_peft(adapter, base, r=10, lora_alpha=20, target_modules="all-linear")
    engine.load_adapter("a", adapter)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, tiny_models.VOCAB_SIZE, n).tolist() for n in (5, 70, 200, 130, 64)]
    names = [None, "a", "a", None, "a"]
    params = jaxserve.SamplingParams(max_tokens=40, temperature=0.0, prompt_logprobs=0, logprobs=0, ignore_eos=True)
    outputs = engine.generate(prompts, params, adapter=names)
    ours, theirs = [], []
    for name in (None, "a"):
        models = {}
        for dtype in (torch.float32, torch.bfloat16):
            model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager")
            models[dtype] = model if name is None else peft.PeftModel.from_pretrained(model, adapter).to(dtype)
        for prompt, output, served in zip(prompts, outputs, names, strict=True):
            if served != name:
                continue
            token_ids = prompt + list(output.token_ids)
            entries = [*output.prompt_logprobs[1:], *output.logprobs]
            found = np.array([entry[token] for entry, token in zip(entries, token_ids[1:], strict=True)])
            expected = logprobs_of(models[torch.float32], token_ids)
            ours.append(np.abs(found - expected))
            theirs.append(np.abs(logprobs_of(models[torch.bfloat16], token_ids) - expected))
    ours, theirs = np.concatenate(ours), np.concatenate(theirs)
    print(f"{family}: mean and largest error {ours.mean():.4f} {ours.max():.4f}, torch {theirs.mean():.4f}")
    assert ours.mean() <= 1.3 * theirs.mean()
    assert ours.max() <= 2 * theirs.max()


@pytest.mark.parametrize("options", [{"finetune_remat": "full"}, {"finetune_stash_tokens": 640}], ids=str)
def test_a_job_is_peft_step_for_step(tmp_path, options):
    rng = np.random.default_rng(5)
    path = tiny_models.build(tmp_path / "model", "llama", tokenizer=False, **SIZES)
    engine = engine_of(path, **options)
    options = {"rank": 6, "alpha": 9, "target_modules": "all-linear"}
    job = engine.finetune(examples(rng), adapter="a", method="lora", **options, **JOB)
    save_peft(job._job.start, tmp_path / "start")
    job.wait()
    assert job.status == "succeeded", job.error
    losses, model = torch_losses(path, tmp_path / "start", job._job)
    assert len(losses) == STEPS
    np.testing.assert_allclose(job.losses, losses, rtol=0.02, atol=0.02)
    job.save(tmp_path / "ours")
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_peft(tmp_path / name, engine.model) for name in ("ours", "theirs"))
    for key, pair in theirs.pairs.items():
        x, y = ours.pairs[key].b.ravel(), pair.b.ravel()
        assert x @ y >= 0.98 * np.linalg.norm(x) * np.linalg.norm(y), key
