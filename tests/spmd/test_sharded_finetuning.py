"""Finetuning on two fake devices: the losses, the adapter and the answers of one device."""

import numpy as np
import pytest
import serving
from safetensors.numpy import load_file

from jaxserve.sampling import SamplingParams

pytestmark = pytest.mark.quick_compiles

EXAMPLES = [serving.prompt(length) for length in (40, 23, 31, 17)]
TRAIN = {"max_finetune_jobs": 1, "finetune_window": 16, "finetune_stash_tokens": 64}
SMALL = {"max_num_seqs": 2, "max_num_batched_tokens": 16, "max_model_len": 64, "num_kv_pages": 16}


@pytest.fixture(scope="module")
def path():
    return serving.model_dir("qwen2", num_attention_heads=8, num_key_value_heads=4, head_dim=8, tokenizer=False)


def train(path, place, tensor_parallel, method, **more):
    engine = serving.engine(path, tensor_parallel=tensor_parallel, **TRAIN, **SMALL)
    options = {"method": method, "rank": 8, "learning_rate": 1e-2, "batch_size": 2, "epochs": 2} | more
    job = engine.finetune(
        [(tokens, None) for tokens in EXAMPLES], adapter="a", **options, output_dir=str(place / "job")
    )
    job.wait()
    job.save(place / "adapter")
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    answer = engine.generate([EXAMPLES[0][:9]], params, adapter="a")[0].token_ids
    return job.losses, load_file(place / "adapter" / "adapter_model.safetensors"), answer, engine


def go_on(engine, place, batches, config):
    """Trains by calls from a saved state; the norms of the two updates."""
    engine.open_adapter("b", **config)
    engine.load_state("b", place)
    norms = []
    for batch in batches:
        engine.forward_backward("b", batch)
        norms.append(engine.optim_step("b")["gradient_norm"])
    engine.save_state("b", place.with_name(f"{place.name}-on"))
    engine.close_adapter("b")
    return norms


@pytest.mark.parametrize(
    ("method", "optimizer"),
    [("lora", "adamw"), ("lora", "adafactor"), pytest.param("dora", "adamw", marks=pytest.mark.slow)],
)
def test_two_devices_train_what_one_does(path, tmp_path, method, optimizer):
    losses, adapter, answer, one = train(path, tmp_path / "one", 1, method, optimizer=optimizer)
    split_losses, split_adapter, split_answer, two = train(path, tmp_path / "two", 2, method, optimizer=optimizer)
    assert len(losses) == 4
    np.testing.assert_allclose(split_losses, losses, rtol=1e-5)
    assert split_adapter.keys() == adapter.keys()
    for name, value in adapter.items():
        np.testing.assert_allclose(split_adapter[name], value, atol=1e-3 * np.abs(value).max(), err_msg=name)
    assert split_answer == answer

    config = {"method": method, "rank": 8, "learning_rate": 1e-2, "optimizer": optimizer}
    batches = [[(tokens, None)] for tokens in EXAMPLES]
    one.open_adapter("b", **config)
    for batch in batches[:2]:
        one.forward_backward("b", batch)
    one.save_state("b", tmp_path / "state")  # gradients that no update has taken are a part of it
    one.close_adapter("b")
    norms = go_on(one, tmp_path / "state", batches[2:], config)
    np.testing.assert_allclose(go_on(two, tmp_path / "state", batches[2:], config), norms, rtol=1e-5)
    back = [go_on(engine, tmp_path / "state-on", batches[:2], config) for engine in (two, one)]
    np.testing.assert_allclose(*back, rtol=1e-5)
