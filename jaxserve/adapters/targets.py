"""Which modules a configuration adapts, by PEFT's own rules.

Patterns come from untrusted files and go through patterns.py, never to a backtracking engine; module names come from
the base model, so there are finitely many.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxserve.adapters.fields import CONFIG_FILE, config_error
from jaxserve.adapters.patterns import Budget, PatternError, first_keys, matching
from jaxserve.adapters.weights import Key, ModelShape, module_names
from jaxserve.errors import AdapterError

NOT_ADAPTABLE = ("lm_head", "model.embed_tokens")


class Matcher:
    """Answers for one configuration and one model; what its patterns may cost is shared by all of them."""

    def __init__(self, config: Mapping[str, Any], model: ModelShape):
        self.config = config
        self.num_layers = model.num_layers
        self.modules = module_names(model)
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
        for name in NOT_ADAPTABLE:
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

    def pattern_names(self, field: str, names: Sequence[str]) -> set[str]:
        """Those ``names`` that the pattern in ``field`` matches as a whole."""
        try:
            return matching(self.config[field], names, self.budget)
        except PatternError as error:
            raise AdapterError(f"{CONFIG_FILE}: {field}: {error}", field) from None

    def _everything(self) -> list[str]:
        return [*self.modules, *NOT_ADAPTABLE]

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
        return not patterns or bool({"layers", "model.layers"} & set(patterns))


def _is_all_linear(targets: Any) -> bool:
    return isinstance(targets, str) and targets.lower() == "all-linear"


def _endings(name: str) -> set[str]:
    """The name itself and what follows each of its dots."""
    parts = name.split(".")
    return {".".join(parts[i:]) for i in range(len(parts))}
