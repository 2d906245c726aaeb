"""The table of supported architectures: one line per family."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxserve.errors import ModelError
from jaxserve.models import gemma2, gemma3, llama, mistral, qwen2, qwen3
from jaxserve.models.config import ModelConfig


@dataclass(frozen=True)
class Family:
    """How to read one architecture's config.json and which tensors its parameters are called."""

    from_hf: Callable[[dict[str, Any]], ModelConfig]
    names: Mapping[str, str]
    ignored: tuple[str, ...] = ()  # tensor name prefixes that are none of our business
    module_roots: tuple[str, ...] = ("model",)  # see ModelConfig


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(llama.from_hf, llama.NAMES),
    "MistralForCausalLM": Family(mistral.from_hf, llama.NAMES),
    "Qwen2ForCausalLM": Family(qwen2.from_hf, llama.NAMES),
    "Qwen3ForCausalLM": Family(qwen3.from_hf, llama.NAMES),
    "Gemma2ForCausalLM": Family(gemma2.from_hf, gemma2.NAMES),
    "Gemma3ForCausalLM": Family(gemma3.from_hf, gemma2.NAMES),
    "Gemma3ForConditionalGeneration": Family(
        gemma3.from_hf_multimodal, gemma2.NAMES, gemma3.IGNORED, gemma3.MODULE_ROOTS
    ),
}


def family_of(hf_config: Mapping[str, Any]) -> Family:
    """The family named by ``architectures``.

    Raises:
      ModelError: no architecture, or one that is not in the table.
    """
    named = hf_config.get("architectures")
    if not isinstance(named, list) or not named:
        raise ModelError("config.json: architectures is missing")
    for name in named:
        if isinstance(name, str) and name in FAMILIES:
            return FAMILIES[name]
    raise ModelError(f"config.json: architecture {named[0]!r} is not supported; supported: {', '.join(FAMILIES)}")
