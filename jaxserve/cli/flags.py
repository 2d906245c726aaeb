"""Command-line flags made from the configuration's sections, so that no key is written twice."""

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Annotated, Any, NamedTuple, get_args

import typer
from pydantic.fields import FieldInfo

from jaxserve.config import Config, Entry, resolve
from jaxserve.config.messages import submodel
from jaxserve.config.section import words
from jaxserve.errors import ConfigError

# where vLLM's flag, or another section's, makes the key's own name the wrong one; () is no flag
NAMES: dict[tuple[str, str], tuple[str, ...]] = {
    ("model", "path"): (),  # the MODEL argument
    ("engine", "tensor_parallel"): ("--tensor-parallel-size", "--tensor-parallel", "-tp"),
    ("lora", "modules"): ("--lora-modules",),
    ("sampling", "seed"): ("--sampling-seed",),
    ("bench", "seed"): ("--bench-seed",),
    ("job", "data"): (),  # the DATA argument
    ("job", "seed"): ("--job-seed",),
    ("coserve", "jobs"): ("--finetune-jobs",),
    ("sweep", "results_dir"): ("--sweep-dir",),
}
ARGUMENTS = {"model": ("model", "path"), "data": ("job", "data")}  # of commands, and the keys they override


class Flag(NamedTuple):
    """One key as a parameter of a command."""

    path: tuple[str, str]
    names: tuple[str, ...]
    field: FieldInfo

    @property
    def argument(self) -> str:
        return "__".join(self.path)

    @property
    def repeats(self) -> bool:
        return isinstance(self.field.default, tuple)

    def parameter(self) -> inspect.Parameter:
        default = "" if self.field.default in (None, ()) else f" [default: {self.field.default}]"
        text = (self.field.description or "") + default
        if self.field.annotation is bool:
            names = f"{self.names[0]}/--no-{self.names[0].removeprefix('--')}"
            kind: Any = Annotated[bool | None, typer.Option(names, help=text)]
        else:  # a list, to see when a flag is given twice
            kind = Annotated[list[str] | None, typer.Option(*self.names, metavar=self._metavar(), help=text)]
        return inspect.Parameter(self.argument, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)

    def entry(self, given: Any) -> Entry:
        """The configuration's entry for what the command line gave."""
        if isinstance(given, bool) or self.repeats:
            return Entry(given, self.names[0])
        if len(given) > 1:
            raise ConfigError([f"{self.names[0]}: given {len(given)} times"])
        return Entry(given[0], self.names[0])

    def _metavar(self) -> str:
        if known := words(self.field.annotation):
            return "|".join(known)
        first = (get_args(self.field.annotation) or (self.field.annotation,))[0]
        kind = getattr(first, "__origin__", first)  # Annotated[int, ...] to int
        if self.repeats:
            return "TEXT..."
        return {int: "INT", float: "FLOAT", str: "TEXT"}.get(kind, "JSON")


def flags(*sections: str) -> Iterator[Flag]:
    """The flags of these sections of the configuration."""
    for name in sections:
        section = submodel(Config, name)
        assert section is not None, name
        for key, field in section.model_fields.items():
            names = NAMES.get((name, key), ("--" + key.replace("_", "-"),))
            if names:
                yield Flag((name, key), names, field)


def configured(*sections: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command ``--config`` and the flags of some sections; it gets them resolved, as ``config``.

    A command's ``model`` and ``data`` arguments override the keys in ARGUMENTS.
    """

    def wrap(command: Callable[..., None]) -> Callable[..., None]:
        known = {flag.argument: flag for flag in flags(*sections)}
        own = [p for p in inspect.signature(command).parameters.values() if p.name != "config"]

        @functools.wraps(command)
        def run(config_file: str | None, **given: Any) -> None:
            entries = {known[k].path: known[k].entry(v) for k, v in given.items() if k in known and v not in (None, [])}
            for argument, path in ARGUMENTS.items():
                if given.get(argument):
                    entries[path] = Entry(given[argument], argument.upper())
            command(config=resolve(config_file, flags=entries), **{k: v for k, v in given.items() if k not in known})

        file = inspect.Parameter(
            "config_file",
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[str | None, typer.Option("--config", metavar="FILE", help="A .yaml or .gin file.")],
        )
        parameters = [*own, file, *(flag.parameter() for flag in known.values())]
        setattr(run, "__signature__", inspect.Signature([p.replace(kind=p.KEYWORD_ONLY) for p in parameters]))  # noqa: B010
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return wrap
