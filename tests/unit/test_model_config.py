"""config.json of every family: what it means, and what is refused."""

import json
import math

import numpy as np
import pytest
import tiny_models
from tiny_models import LLAMA3, YARN

from jaxserve.errors import ModelError
from jaxserve.models.config import ModelConfig, RopeConfig
from jaxserve.models.loader import load_config, load_generation_config
from jaxserve.models.params import param_specs
from jaxserve.models.registry import FAMILIES
from jaxserve.models.rope import inverse_frequencies


def parse(family="llama", **overrides):
    return ModelConfig.from_dict(tiny_models.config_dict(family, **overrides))


def windows(config):
    return [layer.window for layer in config.layers]


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.parametrize(
    "overrides", [{}, {"rope_theta": 7e4}, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}], ids=str
)
def test_the_form_that_transformers_writes_means_the_same(family, overrides, tmp_path):
    transformers = pytest.importorskip("transformers")
    hf = tiny_models.config_dict(family, **overrides)
    (tmp_path / "config.json").write_text(json.dumps(hf))
    transformers.AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "new")
    written = json.loads((tmp_path / "new" / "config.json").read_text())
    assert "rope_parameters" in written.get("text_config", written)
    assert load_config(tmp_path / "new") == ModelConfig.from_dict(hf)


def test_every_supported_architecture_has_a_tiny_model():
    tiny = {tiny_models.config_dict(family)["architectures"][0] for family in tiny_models.FAMILIES}
    assert tiny == set(FAMILIES)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_parameter_names_and_shapes_are_those_of_the_checkpoint(family):
    hf = tiny_models.config_dict(family)
    specs = param_specs(ModelConfig.from_dict(hf), tp=1)
    arrays = [specs["embed"], specs["final_norm"], *([specs["lm_head"]] if "lm_head" in specs else [])]
    arrays += [spec for layer in specs["layers"] for spec in layer.values()]
    ours = {part.name: (part.rows, *spec.shape[1:]) for spec in arrays for part in spec.parts}
    assert ours == tiny_models.tensor_shapes(hf)


def test_head_counts_default_as_in_transformers():
    config = ModelConfig.from_dict({k: v for k, v in tiny_models.config_dict().items() if k != "num_key_value_heads"})
    assert (config.num_kv_heads, config.head_dim) == (4, 16)


def test_mistral_slides_by_default_and_null_switches_it_off():
    hf = tiny_models.config_dict("mistral")
    del hf["sliding_window"]
    assert windows(ModelConfig.from_dict(hf)) == [4096, 4096]
    assert windows(parse("mistral", sliding_window=None)) == [None, None]
    assert windows(parse("mistral", sliding_window=5)) == [5, 5]


def test_qwen_slides_only_when_told_and_only_in_the_last_layers():
    sliding = {"sliding_window": 5, "max_window_layers": 1}
    assert windows(parse("qwen2", **sliding)) == [None, None]
    assert windows(parse("qwen2", use_sliding_window=True, **sliding)) == [None, 5]
    types = ["sliding_attention", "full_attention"]
    assert windows(parse("qwen3", use_sliding_window=True, layer_types=types, **sliding)) == [5, None]
    for family in ("qwen2", "qwen3"):
        assert windows(parse(family, use_sliding_window=True, **sliding | {"sliding_window": None})) == [None, None]


def test_gemma_alternates_local_and_global_layers():
    assert windows(parse("gemma2", num_hidden_layers=3)) == [8, None, 8]
    config = parse("gemma3", num_hidden_layers=7, sliding_window_pattern=6)
    assert windows(config) == [8] * 5 + [None, 8]
    assert [layer.rope.theta for layer in config.layers] == [1e4] * 5 + [1e6, 1e4]


def test_gemma3_multimodal_takes_defaults_and_ids_from_both_levels():
    hf = tiny_models.config_dict("gemma3_multimodal") | {"eos_token_id": [1, 106]}
    for key in ("vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim"):
        del hf["text_config"][key]
    config = ModelConfig.from_dict(hf)
    assert (config.vocab_size, config.num_heads, config.num_kv_heads, config.head_dim) == (262_208, 8, 4, 256)
    assert config.eos_token_ids == (1, 106)
    assert config.embedding_scale == math.sqrt(64)


def test_a_pad_id_of_minus_one_is_none():
    assert parse("llama", pad_token_id=-1).pad_token_id is None
    with pytest.raises(ModelError, match="eos_token_id -1 must be a token id"):
        parse("llama", eos_token_id=-1)


def test_rope_scaling_keeps_short_wavelengths_and_stretches_long_ones():
    plain = inverse_frequencies(RopeConfig(theta=1e4), 64, np.float64)
    for scaling in (LLAMA3, YARN):
        rope = parse(rope_scaling=scaling, head_dim=64).layers[0].rope
        ratio = plain / inverse_frequencies(rope, 64, np.float64)
        np.testing.assert_allclose(ratio[0], 1.0)
        np.testing.assert_allclose(ratio[-1], scaling["factor"])
        assert (np.diff(ratio) > -1e-12).all()


def test_a_rope_of_yarns_authors_is_read_like_any_other():
    published = {key: value for key, value in YARN.items() if key != "rope_type"} | {"type": "yarn", "finetuned": True}
    assert parse(rope_scaling=published) == parse(rope_scaling=YARN)


def test_dynamic_rope_is_the_plain_one_up_to_the_length_it_was_trained_for():
    dynamic = parse(rope_scaling={"type": "dynamic", "factor": 4.0}).layers[0].rope
    plain = parse().layers[0].rope
    np.testing.assert_array_equal(
        inverse_frequencies(dynamic, 16, np.float32), inverse_frequencies(plain, 16, np.float32)
    )


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "'MambaForCausalLM' is not supported; supported: LlamaForCausalLM"),
        ({"architectures": None}, "architectures is missing"),
        ({"architectures": "LlamaForCausalLM"}, "architectures is missing"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "64"}, "hidden_size '64' must be an integer"),
        ({"hidden_size": 64.0}, "hidden_size 64.0 must be an integer"),
        ({"hidden_size": True}, "hidden_size True must be an integer"),
        ({"hidden_size": -64}, "hidden_size -64"),
        ({"hidden_size": 66}, "hidden_size 66 is not a multiple of num_attention_heads 4"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"num_key_value_heads": 0}, "num_key_value_heads 0"),
        ({"num_attention_heads": 0}, "num_attention_heads 0"),
        ({"head_dim": 15}, "head_dim 15 must be even"),
        ({"vocab_size": 2**31}, "vocab_size 2147483648"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers 1000000"),
        ({"intermediate_size": 10**30}, "intermediate_size"),
        ({"rms_norm_eps": 0}, "rms_norm_eps 0"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported; supported: silu"),
        ({"hidden_act": ["silu"]}, "hidden_act"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings 'no' must be true or false"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"eos_token_id": [2, -1]}, "eos_token_id"),
        ({"rope_theta": 0}, "rope_theta 0"),
        ({"rope_theta": float("nan")}, "rope_theta nan"),
        ({"rope_theta": float("inf")}, "rope_theta inf"),
        ({"rope_theta": 10**400}, "rope_theta 1000"),
        ({"rope_theta": 1, "rope_scaling": YARN}, "rope_theta 1 must be above 1 for rope_type 'yarn'"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_type 'longrope' is not supported; supported"),
        ({"rope_scaling": {"type": ["yarn"]}}, "rope_type"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0.0}}, "factor 0.0"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "mrope_section": [1]}}, "mrope_section is not supported"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor 1 must be above"),
        ({"rope_scaling": YARN | {"attention_factor": -1.0}}, "attention_factor -1.0"),
        ({"rope_scaling": YARN | {"beta_fast": "32"}}, "beta_fast '32'"),
        ({"rope_scaling": "yarn"}, "rope_parameters must be one flat set"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters must be one flat set"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"sliding_window": 8}, "sliding_window 8 is not supported for this architecture"),
        ({"num_local_experts": 8}, "num_local_experts 8"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
        ({"attention_bias": "true"}, "attention_bias"),
    ],
    ids=str,
)
def test_a_senseless_config_is_refused_in_one_line_that_names_the_field(overrides, said):
    with pytest.raises(ModelError) as caught:
        parse(**overrides)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("family", "overrides", "said"),
    [
        ("mistral", {"attention_bias": True}, "attention_bias True is not supported"),
        ("mistral", {"sliding_window": 0}, "sliding_window 0"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types must list one type for each of the 2 layers"),
        ("qwen2", {"layer_types": ["full_attention", "linear_attention"]}, "'linear_attention' is not supported"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_window is not set"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation 'gelu'"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar 0"),
        ("gemma2", {"attn_logit_softcapping": -1}, "attn_logit_softcapping -1"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0 is not supported"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention True is not supported"),
        ("gemma3", {"rope_parameters": {"rope_type": "default"}}, "rope_parameters must hold full_attention"),
        ("gemma3", {"rope_parameters": {"chunked_attention": {}}}, "rope_parameters.chunked_attention"),
        ("gemma3", {"rope_scaling": {"rope_type": "longrope"}}, "'longrope' is not supported"),
        ("gemma3", {"sliding_window_pattern": 0}, "sliding_window_pattern 0"),
        ("gemma2", {"sliding_window": None}, "sliding_window is not set"),
        ("gemma3", {"sliding_window": None}, "sliding_window is not set"),
        ("gemma3_multimodal", {"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0 is not supported"),
    ],
    ids=str,
)
def test_a_key_that_would_change_the_maths_is_refused_by_name(family, overrides, said):
    with pytest.raises(ModelError) as caught:
        parse(family, **overrides)
    assert said in str(caught.value)


def test_a_key_that_changes_nothing_is_ignored():
    harmless = {"pretraining_tp": 4, "attention_dropout": 0.1, "_name_or_path": "x", "sliding_window": None}
    assert parse(**harmless, quantization_config=None, partial_rotary_factor=1.0) == parse()


@pytest.mark.parametrize("tp", [3, 8])
def test_a_model_that_cannot_be_split_is_refused(tp):
    with pytest.raises(ModelError, match=f"tensor_parallel {tp} does not divide num_attention_heads 4"):
        param_specs(parse(), tp)


def test_kv_heads_and_shards_must_divide_one_another():
    config = parse(num_attention_heads=12, num_key_value_heads=3, head_dim=16)
    with pytest.raises(ModelError, match="num_key_value_heads 3"):
        param_specs(config, 4)
    assert param_specs(config, 6)["layers"][0]["qkv_proj"].shape == (6 * (2 + 2) * 16, 64)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "config.json: not JSON"),
        ("[]", "config.json: must hold a JSON object"),
        ("[" * 10**5, "config.json: not JSON"),
        ("\xff", "config.json: not"),
        ("{}", "architectures is missing"),
    ],
    ids=["empty", "list", "deep", "latin1", "bare"],
)
def test_a_config_file_that_is_none_is_refused(tmp_path, content, said):
    (tmp_path / "config.json").write_text(content, encoding="latin1")
    with pytest.raises(ModelError) as caught:
        load_config(tmp_path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_directory_or_file_is_refused(tmp_path):
    with pytest.raises(ModelError, match="not a model directory"):
        load_config(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"config\.json: No such file"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("family", "rope", "length"),
    [
        ("llama", None, 512),
        ("llama", {"rope_type": "linear", "factor": 2.5}, 1280),
        ("qwen2", YARN | {"factor": 32.0}, 1024),
        ("qwen2", YARN, 512),  # max_position_embeddings counts it already
        ("llama", {"rope_type": "dynamic", "factor": 2.0}, 512),
        ("llama", LLAMA3, 512),
        ("gemma3", {"rope_type": "linear", "factor": 8.0}, 512),
    ],
)
def test_a_stretched_rope_reaches_further(family, rope, length):
    assert parse(family, rope_scaling=rope).max_length == length


@pytest.mark.parametrize("eos", ["x", [1, "x"], -1, True, {"a": 1}])
def test_a_generation_config_without_token_ids_for_the_end_is_refused(tmp_path, eos):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(ModelError, match=r"generation_config\.json: eos_token_id"):
        load_generation_config(tmp_path)


def test_the_generation_config_is_optional(tmp_path):
    assert load_generation_config(tmp_path) == {}
    tiny_models.build_tokenizer(tmp_path)
    assert load_generation_config(tmp_path)["eos_token_id"] == [tiny_models.EOS, tiny_models.IM_END]


@pytest.mark.parametrize(
    ("name", "billions"), [("llama-3.1-8b", 8.03), ("qwen2.5-14b", 14.77), ("qwen2.5-32b", 32.76), ("qwen3-8b", 8.19)]
)
def test_the_published_configs_have_the_published_number_of_parameters(name, billions, request):
    config = load_config(request.config.rootpath / "configs" / "models" / name)
    specs = param_specs(config, tp=1)
    arrays = [specs["embed"], specs["lm_head"], specs["final_norm"]]
    arrays += [spec for layer in specs["layers"] for spec in layer.values()]
    assert sum(math.prod(spec.shape) for spec in arrays) / 1e9 == pytest.approx(billions, abs=0.005)
