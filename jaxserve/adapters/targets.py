"""Which modules a configuration adapts, by PEFT's own rules.

Patterns come from untrusted files and go through patterns.py, never to a backtracking engine; module names come from
the base model, so there are finitely many.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxserve.adapters.fields import CONFIG_FILE, config_error
from jaxserve.adapters.patterns import Budget, PatternError, first_keys, matching
from jaxserve.adapters.weights import Key, ModelShape, module_name, module_names
from jaxserve.errors import AdapterError

VISION = ("vision_tower", "multi_modal_projector")  # what a multimodal model has beside its decoder


class Matcher:
    """Answers for one configuration and one model; what its patterns may cost is shared by all of them.

    ``root`` is what the decoder is called in the names that are matched, the model's own word by default.
    """

    def __init__(self, config: Mapping[str, Any], model: ModelShape, root: str | None = None):
        self.config = config
        self.num_layers = model.num_layers
        self.root = root or model.module_roots[0]
        self.modules = module_names(model, self.root)
        self.not_adaptable = ("lm_head", f"{self.root}.embed_tokens")
        self.budget = Budget()

    def adapted(self) -> dict[str, Key]:
        """The adapted modules by full name, in the model's order.

        Raises:
          AdapterError: a pattern is refused, none or an unsupported module is named, or options exclude each other.
        """
        targets = self.config["target_modules"]
        names = set(self.modules) if _is_all_linear(targets) else self._named("target_modules")
        self._some_left(names, "target_modules")
        names -= self._named("exclude_modules")
        self._some_left(names, "exclude_modules")
        names &= self._in_chosen_layers()
        self._some_left(names, "layers_to_transform")
        for name in self.not_adaptable:
            if name in names:
                raise config_error("target_modules", targets, f"without {name}: adapters of it are not supported")
        return {name: key for name, key in self.modules.items() if name in names}

    def first_keys(self, field: str) -> dict[str, str]:
        """For each module the first key of the table ``field`` that matches it."""
        table = self.config.get(field) or {}
        try:
            return first_keys(table, list(self.modules), self.budget)
        except PatternError as error:
            raise AdapterError(f"{CONFIG_FILE}: {field}: {error}", field) from None

    def feedforward(self, names: Iterable[str]) -> set[str]:
        """Those ``names`` that ``feedforward_modules`` names, by an ending that need not begin at a dot."""
        wanted = self.config.get("feedforward_modules") or []
        if isinstance(wanted, str):
            return self.pattern_names("feedforward_modules", list(names))
        return {name for name in names if name.endswith(tuple(wanted))}

    def pattern_names(self, field: str, names: Sequence[str]) -> set[str]:
        """Those ``names`` that the pattern in ``field`` matches as a whole."""
        try:
            return matching(self.config[field], names, self.budget)
        except PatternError as error:
            raise AdapterError(f"{CONFIG_FILE}: {field}: {error}", field) from None

    def _everything(self) -> list[str]:
        return [*self.modules, *self.not_adaptable]

    def _some_left(self, names: set[str], field: str) -> None:
        if not names:
            raise config_error(field, self.config.get(field), "such that a module of this model is left to adapt")

    def _named(self, field: str) -> set[str]:
        wanted, names = self.config.get(field), self._everything()
        if not wanted:
            return set()
        if isinstance(wanted, str):
            return self.pattern_names(field, names)
        return {name for name in names if not set(wanted).isdisjoint(_endings(name))}

    def _in_chosen_layers(self) -> set[str]:
        layers, pattern = self.config.get("layers_to_transform"), self.config.get("layers_pattern")
        if layers is None:
            if pattern:
                raise config_error("layers_pattern", pattern, "absent without layers_to_transform")
            return set(self._everything())
        if isinstance(self.config["target_modules"], str):
            raise config_error("layers_to_transform", layers, "null when target_modules is a pattern")
        chosen = [layers] if isinstance(layers, int) else layers
        if not chosen:
            return set(self._everything())
        self._check_layers(chosen)
        # PEFT lets a module that is listed by its full name through, whatever its layer
        full = set(self.config["target_modules"])
        numbered = self._layers_are_called(pattern)
        inside = {name for name, (layer, _) in self.modules.items() if numbered and layer in set(chosen)}
        return inside | {name for name in self._everything() if name in full}

    def _check_layers(self, layers: Iterable[int]) -> None:
        for layer in layers:
            if not 0 <= layer < self.num_layers:
                raise config_error("layers_to_transform", layer, f"from 0 to {self.num_layers - 1}, the model's layers")

    def _layers_are_called(self, pattern: str | list[str] | None) -> bool:
        patterns = [pattern] if pattern and isinstance(pattern, str) else pattern or []
        for each in patterns:
            if not re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*", each):
                raise config_error("layers_pattern", each, "a plain module name, such as 'layers'")
        return not patterns or bool(_endings(f"{self.root}.layers") & set(patterns))


def respelled(config: Mapping[str, Any], model: ModelShape, root: str) -> dict[str, Any]:
    """A configuration that was meant for a decoder called ``root``, in the model's own names.

    Patterns cannot be translated, so each is replaced by the full names of the modules it matches. Raises AdapterError.
    """
    matcher = Matcher(config, model, root)
    own = {name: module_name(*key, model.module_roots[0]) for name, key in matcher.adapted().items()}
    changed: dict[str, Any] = {"target_modules": list(own.values()), "exclude_modules": None}
    changed |= dict.fromkeys(config.keys() & {"layers_to_transform", "layers_pattern"})
    for field in config.keys() & {"rank_pattern", "alpha_pattern"}:
        keys = matcher.first_keys(field)
        changed[field] = {own[name]: config[field][key] for name, key in keys.items() if name in own}
    if "feedforward_modules" in config:
        changed["feedforward_modules"] = sorted(own[name] for name in matcher.feedforward(own))
    return dict(config) | changed


def sparing_vision(config: Mapping[str, Any], model: ModelShape) -> dict[str, Any]:
    """The configuration of a new adapter, with which PEFT leaves the vision half of a multimodal model alone."""
    if len(model.module_roots) == 1:
        return dict(config)
    return dict(config) | {"exclude_modules": rf"(.*\.)?({'|'.join(VISION)})\..*"}


def _is_all_linear(targets: Any) -> bool:
    return isinstance(targets, str) and targets.lower() == "all-linear"


def _endings(name: str) -> set[str]:
    """The name itself and what follows each of its dots."""
    parts = name.split(".")
    return {".".join(parts[i:]) for i in range(len(parts))}
