"""Adapters in the engine against peft on transformers (torch on the CPU, float32)."""

import numpy as np
import pytest
import serving
import tiny_adapters
import tiny_models

pytestmark = pytest.mark.quick_compiles

torch = pytest.importorskip("torch")
pytest.importorskip("peft")

PROMPT = serving.prompt(45, seed=3)
OPTIONS = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "all-linear": {"r": 8, "lora_alpha": 12, "target_modules": "all-linear"},
    "regex": {"r": 5, "lora_alpha": 3, "target_modules": r".*\.(self_attn\.[kv]_proj|mlp\.down_proj)"},
    "rank-pattern": {
        "r": 4,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "k_proj", "o_proj", "up_proj"],
        "rank_pattern": {"q_proj": 33, "layers.1.mlp.up_proj": 1},
    },
    "alpha-pattern": {
        "r": 6,
        "lora_alpha": 6,
        "target_modules": ["v_proj", "gate_proj", "down_proj"],
        "alpha_pattern": {"gate_proj": 30, "layers.0.self_attn.v_proj": 1},
    },
    "both-patterns-rslora": {
        "r": 16,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"down_proj": 20},
        "alpha_pattern": {"q_proj": 9},
        "use_rslora": True,
    },
    "rslora": {"r": 12, "lora_alpha": 5, "target_modules": "all-linear", "use_rslora": True},
    "one-layer": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj"], "layers_to_transform": 1},
    "layer-list": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["gate_proj", "up_proj"],
        "layers_to_transform": [0],
        "layers_pattern": "layers",
    },
    "rank-64": {"r": 64, "lora_alpha": 64, "target_modules": ["o_proj", "down_proj"]},
    "rank-1": {"r": 1, "lora_alpha": 3, "target_modules": ["k_proj"]},
}
SCALED = {
    "dora": {"r": 6, "lora_alpha": 12, "target_modules": "all-linear", "use_dora": True},
    "dora-one-layer": {
        "r": 20,
        "lora_alpha": 9,
        "target_modules": ["v_proj", "o_proj", "up_proj"],
        "layers_to_transform": 1,
        "use_dora": True,
        "use_rslora": True,
    },
    "ia3": {
        "peft_type": "IA3",
        "target_modules": ["k_proj", "v_proj", "down_proj"],
        "feedforward_modules": ["down_proj"],
    },
    "ia3-inputs-of-fused-layers": {
        "peft_type": "IA3",
        "target_modules": ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj"],
        "feedforward_modules": ["q_proj", "o_proj", "up_proj"],
    },
}


@pytest.fixture(scope="module")
def path():
    return serving.model_dir()


@pytest.fixture(scope="module")
def engine(path):
    return serving.engine(path)


@pytest.fixture(scope="module")
def adapted(path, tmp_path_factory):
    """(directory, log-probabilities [T, V] of PEFT) by name of the options."""

    def make(name, base=path, **options):
        directory = tmp_path_factory.mktemp(name) / "adapter"
        hf_model = tiny_models.reference.__wrapped__(base)  # peft changes the model it is given
        model = tiny_adapters.write_with_peft(directory, hf_model, seed=len(name), **options)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([PROMPT])).logits[0]
        return directory, logits.log_softmax(-1).double().numpy()

    return make


def check(engine, name, theirs_TV, base_TV):
    (output,) = engine.generate([PROMPT], serving.greedy(1, prompt_logprobs=5), adapter=name)
    assert output.adapter == name
    assert np.abs(theirs_TV - base_TV).max() > 0.1, "the adapter does nothing"
    for position, ours in enumerate(output.prompt_logprobs[1:], 1):
        ids = list(ours)
        np.testing.assert_allclose([ours[i] for i in ids], theirs_TV[position - 1, ids], atol=1e-4)
    assert output.token_ids == [theirs_TV[-1].argmax()]


@pytest.mark.parametrize("name", OPTIONS)
def test_prompt_log_probabilities_are_those_of_peft(engine, path, adapted, name):
    directory, theirs_TV = adapted(name, **OPTIONS[name])
    engine.load_adapter(name, directory)
    base_TV = torch.tensor(tiny_models.reference_logits(path, PROMPT)).log_softmax(-1).double().numpy()
    check(engine, name, theirs_TV, base_TV)
    engine.unload_adapter(name)


@pytest.mark.parametrize(
    "family", ["qwen2", *(pytest.param(f"gemma3{s}", marks=pytest.mark.slow) for s in ("", "_multimodal"))]
)
def test_families_with_other_layers_agree_as_well(adapted, family):
    path = serving.model_dir(family, num_key_value_heads=1)
    options = {"r": 20, "lora_alpha": 30, "target_modules": "all-linear", "exclude_modules": r".*vision_tower.*"}
    directory, theirs_TV = adapted(family, path, **options)
    engine = serving.engine(path)
    engine.load_adapter("it", directory)
    base_TV = torch.tensor(tiny_models.reference_logits(path, PROMPT)).log_softmax(-1).double().numpy()
    check(engine, "it", theirs_TV, base_TV)


def test_all_options_in_one_batch_are_as_alone(engine, adapted):
    """Eleven adapters through four device slots."""
    for name, options in OPTIONS.items():
        engine.load_adapter(name, adapted(name, **options)[0])
    params = serving.greedy(12, prompt_logprobs=1)
    alone = [serving.bits(engine.generate([PROMPT], params, adapter=name)[0]) for name in OPTIONS]
    together = engine.generate([PROMPT] * len(OPTIONS), params, adapter=list(OPTIONS))
    assert [serving.bits(output) for output in together] == alone
    assert len({tuple(output.token_ids) for output in together}) > len(OPTIONS) // 2
    serving.check_idle(engine)


@pytest.fixture(scope="module")
def biased():
    """A model with biases: (IA)3 scales them, DoRA does not."""
    return serving.model_dir("qwen2")


@pytest.fixture(scope="module")
def scaled_engine(biased):
    return serving.engine(biased)


def test_the_first_adapter_with_scales_compiles_nothing_in_the_loop(scaled_engine, biased, tmp_path, monkeypatch):
    compiled = serving.count_compilations(monkeypatch, scaled_engine.core, "_warm_up_writer", "_try_all")
    config = tiny_adapters.ia3_config()
    tensors = tiny_adapters.random_tensors(config, serving.model_config(biased))
    scaled_engine.load_adapter("first", tiny_adapters.write_files(tmp_path / "first", config, tensors))
    scaled_engine.unload_adapter("first")
    assert compiled == {"_warm_up_writer": 0, "_try_all": 0}


@pytest.mark.parametrize("name", SCALED)
def test_dora_and_ia3_are_those_of_peft(scaled_engine, biased, adapted, name):
    directory, theirs_TV = adapted(name, biased, **SCALED[name])
    scaled_engine.load_adapter(name, directory)
    base_TV = torch.tensor(tiny_models.reference_logits(biased, PROMPT)).log_softmax(-1).double().numpy()
    check(scaled_engine, name, theirs_TV, base_TV)


def test_all_methods_in_one_batch_are_as_alone(scaled_engine, biased, adapted):
    """Six adapters through four device slots, the base among them; scales of one are nobody else's."""
    for name, options in SCALED.items():
        scaled_engine.load_adapter(name, adapted(name, biased, **options)[0])
    for rank in (4, 40):
        scaled_engine.load_adapter(f"lora-{rank}", serving.adapter_dir(biased, seed=rank, rank=rank))
    names, params = [*SCALED, "lora-4", "lora-40", None], serving.greedy(12, prompt_logprobs=1, logprobs=2)
    alone = [serving.bits(scaled_engine.generate([PROMPT], params, adapter=name)[0]) for name in names]
    assert len({str(bits) for bits in alone}) == len(names)
    together = scaled_engine.generate([PROMPT] * len(names), params, adapter=names)
    assert [serving.bits(output) for output in together] == alone
    assert scaled_engine.stats()["recompiles"] == 0
    serving.check_idle(scaled_engine)

    never = serving.engine(biased)
    never.load_adapter("lora-4", serving.adapter_dir(biased, seed=4, rank=4))
    plain = [serving.bits(never.generate([PROMPT], params, adapter=name)[0]) for name in ("lora-4", None)]
    assert plain == [alone[names.index("lora-4")], alone[names.index(None)]], "programs with scales change others' bits"


@pytest.fixture(scope="module")
def sixteen():
    """An engine whose step holds 16 sequences and 16 adapters of ranks 4 to 64."""
    path = serving.model_dir()
    engine = serving.engine(path, **serving.LARGE | {"max_num_batched_tokens": 64})
    for i, rank in enumerate((4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60, 64)):
        engine.load_adapter(f"rank-{rank}", serving.adapter_dir(path, seed=i, rank=rank))
    return engine


def test_16_requests_on_16_adapters_in_one_batch_equal_each_alone(sixteen):
    names = [info.name for info in sixteen.list_adapters()]
    prompts = [serving.prompt(3 + i) for i in range(16)]
    alone = [
        serving.bits(sixteen.generate([prompt], serving.greedy(24), adapter=name)[0])
        for prompt, name in zip(prompts, names, strict=True)
    ]
    sixteen.core.pool.drop_cache()
    seen = watch_batches(sixteen)
    together = sixteen.generate(prompts, serving.greedy(24), adapter=names)
    assert [serving.bits(output) for output in together] == alone
    assert max(seen) == 16
    assert len({tuple(output.token_ids) for output in together}) == 16


def watch_batches(engine):
    """Number of adapters in each packed step from now on."""
    seen, pack = [], engine.core.packer.pack

    def counting(plan, *program):
        segments = (*plan.chunks, *plan.decodes)
        seen.append(len({s.seq.request.adapter.name for s in segments if s.seq.request.adapter}))
        return pack(plan, *program)

    engine.core.packer.pack = counting
    return seen
