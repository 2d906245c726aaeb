"""Makes PEFT adapter directories for tests: with numpy alone, or with the real peft and torch."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from jaxserve.adapters import ia3, lora
from jaxserve.adapters.method import method_of
from jaxserve.adapters.peft_io import load_peft
from jaxserve.adapters.weights import ModelShape
from jaxserve.errors import AdapterError

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class TinyShape:
    """The part of a model's configuration that adapters look at."""

    num_layers: int = 2
    hidden_size: int = 32
    intermediate_size: int = 48
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 8
    module_roots: tuple[str, ...] = ("model",)


TINY = TinyShape()


def lora_config(**options: Any) -> dict[str, Any]:
    """adapter_config.json of a LoRA adapter: r, lora_alpha, target_modules, and any other key."""
    chosen = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | options
    return lora.new_config(rank=chosen.pop("r"), alpha=chosen.pop("lora_alpha"), **chosen)


def ia3_config(**options: Any) -> dict[str, Any]:
    """adapter_config.json of an IA3 adapter."""
    chosen = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    return ia3.new_config(**chosen | options)


def random_tensors(
    config: dict[str, Any], model: ModelShape = TINY, *, seed: int = 0, scale: float = 0.2, dtype: Any = np.float32
) -> dict[str, np.ndarray]:
    """The tensors the configuration asks for, B included, normal with deviation ``scale``."""
    rng = np.random.default_rng(seed)
    shapes = method_of(config).shapes(config, model)
    return {name: (rng.standard_normal(shape) * scale).astype(dtype) for name, shape in sorted(shapes.items())}


def write_files(path: Path, config: Any, tensors: dict[str, np.ndarray] | bytes, metadata: Any = None) -> Path:
    """Writes the two files as they are given (bytes: byte for byte); returns ``path``."""
    path.mkdir(parents=True, exist_ok=True)
    text = config if isinstance(config, bytes) else json.dumps(config, indent=2).encode()
    (path / CONFIG).write_bytes(text)
    if not isinstance(tensors, bytes):
        tensors = safetensors.numpy.save(tensors, metadata or {"format": "pt"})
    (path / TENSORS).write_bytes(tensors)
    return path


def write_adapter(
    path: Path, model: ModelShape = TINY, *, seed: int = 0, scale: float = 0.2, dtype: Any = np.float32, **options: Any
) -> Path:
    """A PEFT LoRA directory with random weights; ``options`` are keys of its adapter_config.json. No torch needed."""
    config = lora_config(**options)
    return write_files(path, config, random_tensors(config, model, seed=seed, scale=scale, dtype=dtype))


def hf_llama(model: ModelShape = TINY, vocab_size: int = 64, seed: int = 0) -> Any:
    """A random transformers Llama of that shape, float32, in eval mode."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        head_dim=model.head_dim,
    )
    return transformers.LlamaForCausalLM(config).eval()


def hf_gemma3(model: ModelShape = TINY, vocab_size: int = 64, seed: int = 0) -> Any:
    """A random multimodal Gemma 3 whose language half has that shape, as ``hf_llama``."""
    import torch
    import transformers

    torch.manual_seed(seed)
    text = {
        "vocab_size": vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
    }
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14}, mm_tokens_per_image=4
    )
    return transformers.Gemma3ForConditionalGeneration(config).eval()


def write_with_peft(
    path: Path, hf_model: Any, *, seed: int = 0, scale: float = 0.2, dtype: str = "float32", **options: Any
) -> Any:
    """Has the real peft adapt ``hf_model`` and save itself to ``path``; returns the PeftModel.

    Every adapter weight is made random, so that an adapter that was not applied shows. ``options`` go to LoraConfig,
    or to IA3Config with peft_type="IA3".
    """
    import peft
    import torch

    kind = peft.IA3Config if options.pop("peft_type", "LORA") == "IA3" else peft.LoraConfig
    model = peft.get_peft_model(hf_model, kind(task_type="CAUSAL_LM", **options)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("lora_", "ia3_")):
                parameter.data = parameter.data.to(getattr(torch, dtype))
                parameter += torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * scale
    model.save_pretrained(str(path))
    return model


def peft_modules(model):
    """(layer, member) -> PEFT's own adapted module."""
    return {
        (int(name.split(".layers.")[1].split(".")[0]), name.split(".")[-1]): module
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight") or hasattr(module, "ia3_l")
    }


def refusal(path, model=TINY, **options) -> AdapterError:
    """The error with which a directory is refused, one short line."""
    with pytest.raises(AdapterError) as caught:
        load_peft(path, model, **options)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    return caught.value
