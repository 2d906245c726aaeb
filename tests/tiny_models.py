"""Tiny random models of every family, written as Hugging Face directories. Building needs no torch.

    path = tiny_models.build(tmp_path / "m", "qwen3", num_key_value_heads=1, tie_word_embeddings=True)
    tiny_models.reference_logits(path, [1, 2, 3])      # [T, V] float32 from transformers (skips without torch)

Keyword arguments that are not parameters of ``build`` are keys of config.json. Weights are spread widely, so that
greedy choices are far apart and no norm, bias or soft cap is close to doing nothing.
"""

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|pad|>", "<|im_start|>", "<|im_end|>")
MERGES = [
    "t h", "th e", "Ġ the", "i n", "a n", "an d", "Ġ and", "o n", "e r", "r e", "Ġ a", "Ġ t",
    "Ġ s", "o r", "i s", "Ġ o", "h e", "l l", "l o", "he ll", "hell o", "o u", "Ġ w",
]  # fmt: skip
BOS, EOS, PAD, IM_START, IM_END = range(256 + len(MERGES), 256 + len(MERGES) + len(SPECIAL))
TOKENIZER_SIZE = IM_END + 1
VOCAB_SIZE = 300

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "dtype": "float32",
}
_GEMMA: dict[str, Any] = {
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "sliding_window": 8,
    "tie_word_embeddings": True,
}
_GEMMA3: dict[str, Any] = _GEMMA | {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "sliding_window_pattern": 2,
    "rope_local_base_freq": 10_000.0,
    "rope_theta": 1_000_000.0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rope_theta": 1e4},
    "mistral": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_act": "silu",
        "sliding_window": None,
    },
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu"},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu", "head_dim": 32},
    "gemma2": _GEMMA
    | {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 20.0,
    },
    "gemma3": _GEMMA3,
    "gemma3_multimodal": _GEMMA3,
}


def config_dict(family: str = "llama", **overrides: Any) -> dict[str, Any]:
    """A config.json of this family as a dict."""
    config = _COMMON | FAMILIES[family] | overrides
    if family != "gemma3_multimodal":
        return config
    tokens = {key: config.pop(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    vision = {"model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "text_config": config,
        "vision_config": vision | {"num_attention_heads": 2, "image_size": 28, "patch_size": 14},
        "mm_tokens_per_image": 4,
        **tokens,
    }


def build(
    directory: str | Path,
    family: str = "llama",
    *,
    seed: int = 0,
    dtype: str = "float32",
    num_shards: int = 1,
    tokenizer: bool = True,
    rename: Callable[[str], str] = lambda name: name,
    edit: Callable[[dict[str, np.ndarray]], None] = lambda tensors: None,
    **overrides: Any,
) -> str:
    """Writes a model directory and returns its path.

    Args:
      seed: of the weights; equal seeds give equal weights whatever ``dtype`` and ``num_shards`` are.
      num_shards: 1 writes model.safetensors, more an index and that many shards.
      rename: maps the standard tensor names to those in the file.
      edit: changes the dict of tensors (under their standard names) before it is written.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = config_dict(family, **overrides) | {"dtype": dtype}
    tensors = random_tensors(config, seed)
    edit(tensors)
    if family == "gemma3_multimodal":
        tensors = _multimodal(tensors)
    tensors = {rename(name): np.ascontiguousarray(value.astype(dtype)) for name, value in tensors.items()}
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    _write_tensors(directory, tensors, num_shards)
    if tokenizer:
        build_tokenizer(directory)
    return str(directory)


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a language model's tensors, as transformers writes them."""
    config = config.get("text_config", config)
    kind = config["model_type"]
    D, F, H, K = (config[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"))
    C, is_gemma = config.get("head_dim") or D // H, kind.startswith("gemma")
    attention_bias = config.get("attention_bias", False)
    linears = {
        "self_attn.q_proj": (H * C, D, kind == "qwen2" or attention_bias),
        "self_attn.k_proj": (K * C, D, kind == "qwen2" or attention_bias),
        "self_attn.v_proj": (K * C, D, kind == "qwen2" or attention_bias),
        "self_attn.o_proj": (D, H * C, attention_bias),
        "mlp.gate_proj": (F, D, config.get("mlp_bias", False)),
        "mlp.up_proj": (F, D, config.get("mlp_bias", False)),
        "mlp.down_proj": (D, F, config.get("mlp_bias", False)),
    }
    norms = {"input_layernorm": D, "post_attention_layernorm": D}
    if is_gemma:
        norms |= {"pre_feedforward_layernorm": D, "post_feedforward_layernorm": D}
    if kind in ("qwen3", "gemma3_text"):
        norms |= {"self_attn.q_norm": C, "self_attn.k_norm": C}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], D)}
    for i in range(config["num_hidden_layers"]):
        for name, (rows, columns, bias) in linears.items():
            shapes[f"model.layers.{i}.{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"model.layers.{i}.{name}.bias"] = (rows,)
        shapes |= {f"model.layers.{i}.{name}.weight": (size,) for name, size in norms.items()}
    shapes["model.norm.weight"] = (D,)
    if not config.get("tie_word_embeddings", is_gemma):
        shapes["lm_head.weight"] = (config["vocab_size"], D)
    return shapes


def random_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 weights for ``tensor_shapes(config)``."""
    rng = np.random.default_rng(seed)
    model_type = config.get("text_config", config)["model_type"]
    centre = 0.0 if model_type.startswith("gemma") else 1.0  # Gemma's norms multiply by 1 + w
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        noise = rng.standard_normal(shape, dtype=np.float32)
        if len(shape) == 2:
            scale = 0.5 if "embed_tokens" in name else 2.0 if "lm_head" in name else 1.0
            tensors[name] = noise * np.float32(scale / (1 if "embed_tokens" in name else shape[1] ** 0.5))
        elif name.endswith(".bias"):
            tensors[name] = noise * np.float32(0.3)
        else:
            tensors[name] = noise * np.float32(0.2) + np.float32(centre)
    return tensors


def build_tokenizer(directory: str | Path, *, extra_tokens: tuple[str, ...] = (), chat_template: str = CHAT_TEMPLATE):
    """Writes a byte-level BPE tokenizer with a few merges, a bos, a chat template and a generation config."""
    directory = Path(directory)
    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    pairs = [tuple(merge.split(" ")) for merge in MERGES]
    for left, right in pairs:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in extra_tokens])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[0]} $A", pair=f"{SPECIAL[0]} $A {SPECIAL[0]}:1 $B:1", special_tokens=[(SPECIAL[0], BOS)]
    )
    assert tokenizer.token_to_id(SPECIAL[-1]) == IM_END
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[0],
        "eos_token": SPECIAL[1],
        "pad_token": SPECIAL[2],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
        "chat_template": chat_template,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    generation = {"bos_token_id": BOS, "eos_token_id": [EOS, IM_END], "pad_token_id": PAD, "do_sample": False}
    (directory / "generation_config.json").write_text(json.dumps(generation))


@lru_cache(maxsize=8)
def reference(directory: str, dtype: str = "float32"):
    """The directory as a transformers model on the CPU, every tensor accounted for; skips the test without torch."""
    import pytest

    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    is_text = "text_config" not in json.loads((Path(directory) / "config.json").read_text())
    loader = AutoModelForCausalLM if is_text else AutoModelForImageTextToText
    model, info = loader.from_pretrained(
        directory, dtype=getattr(torch, dtype), attn_implementation="eager", output_loading_info=True
    )
    missing = [k for k in info["missing_keys"] if "vision" not in k and "multi_modal" not in k and "lm_head" not in k]
    assert not missing, missing
    assert not info["unexpected_keys"], info["unexpected_keys"]
    return model.eval()


def reference_logits(directory: str, token_ids: list[int], dtype: str = "float32") -> np.ndarray:
    """[T, V] float32 logits of transformers for one sequence."""
    model = reference(str(directory), dtype)
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor([list(token_ids)])).logits[0].float().numpy()


def reference_greedy(directory: str, token_ids: list[int], num_tokens: int) -> list[int]:
    """``num_tokens`` greedy tokens of transformers, whole sequence recomputed for each; ends are ignored."""
    ids = list(token_ids)
    for _ in range(num_tokens):
        ids.append(int(reference_logits(directory, ids)[-1].argmax()))
    return ids[len(token_ids) :]


def _multimodal(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Puts the language model under its prefix and adds tensors of the vision half."""
    tensors = {f"language_model.{name}": value for name, value in tensors.items()}
    tensors["multi_modal_projector.mm_soft_emb_norm.weight"] = np.zeros(16, np.float32)
    tensors["vision_tower.embeddings.patch_embedding.bias"] = np.zeros(16, np.float32)
    return tensors


def _write_tensors(directory: Path, tensors: dict[str, np.ndarray], num_shards: int) -> None:
    if num_shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return
    names, weight_map = sorted(tensors), {}
    for i in range(num_shards):
        file = f"model-{i + 1:05}-of-{num_shards:05}.safetensors"
        shard = {name: tensors[name] for name in names[i::num_shards]}
        save_file(shard, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
