"""Adapters of a multimodal base, whose decoder has names of its own and a vision tower beside it."""

import json
import re

import numpy as np
import pytest
import safetensors.numpy
from tiny_adapters import (
    CONFIG,
    TENSORS,
    TinyShape,
    hf_gemma3,
    ia3_config,
    lora_config,
    peft_modules,
    random_tensors,
    refusal,
    write_adapter,
    write_files,
    write_with_peft,
)

from jaxserve.adapters import lora
from jaxserve.adapters.peft_io import load_peft, save_peft
from jaxserve.adapters.targets import sparing_vision
from jaxserve.models import gemma3

MULTIMODAL = TinyShape(module_roots=gemma3.MODULE_ROOTS)
NO_VISION = {"exclude_modules": r".*\.(vision_tower|multi_modal_projector)\..*"}
UNSLOTH = (  # of get_peft_regex with finetune_vision_layers=False
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|o_proj|gate_proj|up_proj|down_proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\."
    r"(?:(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|o_proj|gate_proj|up_proj|down_proj)))"
)
MULTIMODAL_CASES = {
    "list": {"target_modules": ["q_proj", "down_proj"], **NO_VISION},
    "list of the decoder's alone": {"target_modules": ["o_proj", "up_proj"]},
    "suffixes": {"target_modules": ["language_model.layers.1.self_attn.q_proj", "gate_proj"]},
    "full names": {"target_modules": ["model.language_model.layers.0.self_attn.k_proj"]},
    "regex": {"target_modules": r"model\.language_model\.layers\.\d+\.(self_attn\.[qv]|mlp\.gate)_proj"},
    "unsloth": {"target_modules": UNSLOTH},
    "all-linear": {"target_modules": "all-linear", **NO_VISION},
    "patterns": {
        "target_modules": r".*language_model.*_proj",
        "rank_pattern": {"language_model.layers.1.self_attn.q_proj": 3, r"^model\.language_model\..*\.v_proj": 7},
        "alpha_pattern": {"model.language_model.layers.0.mlp.up_proj": 3},
        "use_rslora": True,
    },
    "layers": {
        "target_modules": ["o_proj", "up_proj"],
        "layers_to_transform": [1],
        "layers_pattern": "language_model.layers",
    },
    "dora": {"target_modules": r".*language_model.*q_proj", "use_dora": True},
    "ia3": {
        "peft_type": "IA3",
        "target_modules": r".*language_model.*\.(v|up|down)_proj",
        "feedforward_modules": [r"1.mlp.down_proj"],
    },
}


def logits(model):
    import torch

    with torch.no_grad():
        return model(input_ids=torch.arange(20).reshape(1, 20)).logits


@pytest.mark.parametrize("options", MULTIMODAL_CASES.values(), ids=MULTIMODAL_CASES)
def test_adapters_of_a_multimodal_base_go_from_peft_to_us_and_back(tmp_path, options):
    peft = pytest.importorskip("peft")
    theirs = write_with_peft(tmp_path / "theirs", hf_gemma3(), **options)
    weights = load_peft(tmp_path / "theirs", MULTIMODAL)
    assert (weights.pairs or weights.vectors).keys() == peft_modules(theirs).keys()
    assert all(scale == peft_modules(theirs)[key].scaling["default"] for key, scale in weights.scaling.items())
    save_peft(weights, tmp_path / "ours")
    assert (tmp_path / "ours" / TENSORS).read_bytes() == (tmp_path / "theirs" / TENSORS).read_bytes()
    ours = peft.PeftModel.from_pretrained(hf_gemma3(), str(tmp_path / "ours")).eval()
    assert (logits(ours) == logits(theirs)).all()


def spelled(root):
    """Configurations that name modules of a decoder called ``root``."""
    escaped = re.escape(root)
    return {
        "short names": lora_config(),
        "regex": lora_config(target_modules=rf"{escaped}\.layers\.\d+\.(self_attn\.[qv]|mlp\.gate)_proj"),
        "full names": lora_config(target_modules=[f"{root}.layers.1.mlp.up_proj", "o_proj"], use_dora=True),
        "excluded": lora_config(target_modules="all-linear", exclude_modules=[f"{root}.layers.0.mlp.up_proj"]),
        "layers": lora_config(layers_to_transform=[1], layers_pattern=f"{root}.layers"),
        "patterns": lora_config(
            rank_pattern={f"{root}.layers.1.self_attn.q_proj": 3, rf"^{escaped}\..*\.v_proj": 7},
            alpha_pattern={"q_proj": 3, "k_proj": 5},
        ),
        "ia3": ia3_config(feedforward_modules=[f"{root}.layers.1.mlp.down_proj"]),
    }


@pytest.mark.parametrize("case", spelled(""))
@pytest.mark.parametrize("root", MULTIMODAL.module_roots[1:])
def test_an_adapter_with_other_names_of_the_decoder_is_the_same_and_is_saved_with_those_of_today(tmp_path, root, case):
    today = MULTIMODAL.module_roots[0]
    config = spelled(today)[case]
    tensors = random_tensors(config, MULTIMODAL)
    expected = load_peft(write_files(tmp_path / "today", config, tensors), MULTIMODAL)
    renamed = {name.replace(today, root): tensor for name, tensor in tensors.items()}
    weights = load_peft(write_files(tmp_path / "then", spelled(root)[case], renamed), MULTIMODAL)
    assert weights.digest == expected.digest
    save_peft(weights, tmp_path / "saved")
    assert safetensors.numpy.load_file(tmp_path / "saved" / TENSORS).keys() == tensors.keys()
    assert load_peft(tmp_path / "saved", MULTIMODAL).digest == expected.digest


def test_peft_loads_an_adapter_with_the_names_of_before_once_it_was_saved_here(tmp_path):
    peft = pytest.importorskip("peft")
    theirs = write_with_peft(tmp_path / "theirs", hf_gemma3(), target_modules=r".*language_model.*[qv]_proj")
    tensors = safetensors.numpy.load_file(tmp_path / "theirs" / TENSORS)
    renamed = {name.replace("model.language_model", "language_model.model"): each for name, each in tensors.items()}
    config = json.loads((tmp_path / "theirs" / CONFIG).read_text())
    config["target_modules"] = r"language_model\.model\.layers\..*[qv]_proj"
    save_peft(load_peft(write_files(tmp_path / "then", config, renamed), MULTIMODAL), tmp_path / "ours")
    ours = peft.PeftModel.from_pretrained(hf_gemma3(), str(tmp_path / "ours")).eval()
    assert (logits(ours) == logits(theirs)).all()


def test_tensors_of_the_vision_half_are_refused_by_name(tmp_path):
    config = lora_config(target_modules=["q_proj"])
    name = "base_model.model.model.vision_tower.encoder.layers.0.self_attn.q_proj.lora_A.weight"
    tensors = random_tensors(config, MULTIMODAL) | {name: np.zeros((4, 16), np.float32)}
    error = refusal(write_files(tmp_path, config, tensors), MULTIMODAL)
    assert error.field == name
    assert "vision half" in str(error)


def test_peft_adapts_nothing_else_for_a_new_adapter_of_a_multimodal_base(tmp_path):
    peft = pytest.importorskip("peft")
    for targets in ("all-linear", ["q_proj", "v_proj"]):
        config = sparing_vision(lora.new_config(rank=4, alpha=6, target_modules=targets), MULTIMODAL)
        weights = lora.initial(config, MULTIMODAL, np.random.default_rng(3))
        save_peft(weights, tmp_path)
        model = peft.PeftModel.from_pretrained(hf_gemma3(), str(tmp_path))
        assert not any("lora" in name and "vision" in name for name, _ in model.named_modules())
        assert peft_modules(model).keys() == weights.pairs.keys()


def test_the_decoder_of_a_text_model_has_one_name(tmp_path):
    path = write_adapter(tmp_path, MULTIMODAL)
    assert "model.layers.N" in str(refusal(path))
