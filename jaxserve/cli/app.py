"""The commands. What is heavy (jax, the engine) is imported by the command that needs it.

Exit status: 0 done, 1 the engine, a request or a job failed, 2 wrong usage, configuration, data or request, 4 a model
or adapter that cannot be served, 130 Ctrl-C, 143 SIGTERM.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

import jaxserve
from jaxserve.bench.engine import counting, load_engine, model_path, room_to_answer, tokenizer_of
from jaxserve.cli.flags import configured
from jaxserve.config import Config, dump_config
from jaxserve.errors import AdapterError, ConfigError, EngineError, InvalidRequest, JaxServeError, ModelError
from jaxserve.finetune.errors import CheckpointMismatch, DataError

if TYPE_CHECKING:
    from jaxserve import Engine
    from jaxserve.finetune.job import JobEvent

app = typer.Typer(
    help="LLM inference and LoRA finetuning on the same accelerators, in JAX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its tables cut long flags off
    context_settings={"help_option_names": ["-h", "--help"]},
)


class ListByDefault(TyperGroup):
    """``jobs DIR`` is ``jobs list DIR``."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["list", *args]
        return super().parse_args(ctx, args)


config_app = typer.Typer(help="Look at a configuration.", no_args_is_help=True)
bench_app = typer.Typer(help="Measure.", no_args_is_help=True)
jobs_app = typer.Typer(
    help="Finetuning jobs by their directories: `jaxserve jobs DIR` lists those below DIR.",
    no_args_is_help=True,
    cls=ListByDefault,
)
app.add_typer(config_app, name="config")
app.add_typer(jobs_app, name="jobs")
app.add_typer(bench_app, name="bench")

Model = Annotated[str | None, typer.Argument(metavar="MODEL", help="Directory of a Hugging Face model.")]
JsonLines = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]
JobDirectory = Annotated[Path, typer.Argument(metavar="DIR", help="Directory of the job.")]
Adapter = Annotated[str | None, typer.Option(help="Adapter that answers; by default the base model does.")]


class Format(StrEnum):
    yaml = "yaml"
    gin = "gin"
    json = "json"


class Device(StrEnum):
    h200 = "h200"
    h100 = "h100"
    a100 = "a100-80gb"


class Lengths(StrEnum):
    sharegpt = "sharegpt"
    azure = "azure"


@app.command()
@configured("model", "engine", "lora", "sampling")
def generate(
    config: Config,
    model: Model = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given many times.")] = None,
    adapter: Adapter = None,
    json_lines: Annotated[bool, typer.Option("--json", help="One JSON object per prompt.")] = False,
) -> None:
    """Complete prompts and print the texts."""
    if not prompt:
        raise ConfigError(["--prompt: at least one is needed"])
    check_answers(config, adapter, prompt)
    seqs, tokens = len(prompt) * config.sampling.params().n, sum(len(text.encode(errors="replace")) for text in prompt)
    failed, engine = False, build_engine(config, room_to_answer(config, seqs, tokens))
    for output in engine.generate(prompt, config.sampling.params(engine.default_params), adapter=adapter):
        if json_lines:
            print(json.dumps(dataclasses.asdict(output), ensure_ascii=False))
        for choice in output.outputs:
            if choice.error:
                failed = True
                print(f"error: {choice.error}", file=sys.stderr)
            elif not json_lines:
                print(choice.text)
    raise typer.Exit(1 if failed else 0)


@app.command()
@configured("model", "engine", "lora", "sampling")
def chat(
    config: Config,
    model: Model = None,
    adapter: Adapter = None,
    chat_template_kwargs: Annotated[
        str | None, typer.Option(metavar="JSON", help='Names for the chat template, as {"enable_thinking": false}.')
    ] = None,
) -> None:
    """Talk to a model. /reset forgets the conversation, /adapter NAME changes the adapter, Ctrl-D leaves."""
    from jaxserve.cli.chat import check, talk

    if (n := config.sampling.params().n) > 1:
        raise ConfigError([f"sampling.n {n}: a conversation goes on from one answer"])
    variables = _template_variables(chat_template_kwargs)
    check_answers(config, adapter)
    check(config)
    engine = build_engine(config, room_to_answer(config, n))
    params = config.sampling.params(engine.default_params)
    if "max_tokens" not in config.sampling.model_fields_set:
        params = dataclasses.replace(params, max_tokens=None)  # answers end where the model ends them
    talk(engine, params, adapter, variables)


def _template_variables(text: str | None) -> dict[str, Any]:
    from jaxserve.prompts import template_variables

    try:
        return template_variables(None if text is None else json.loads(text))
    except (ValueError, RecursionError) as error:
        raise ConfigError([f"--chat-template-kwargs: {error}"]) from None


@bench_app.command()
@configured("model", "engine", "lora", "finetune", "sampling", "bench")
def serving(config: Config, model: Model = None) -> None:
    """Replay a trace, or made-up load, against the engine; print latencies and throughput."""
    from jaxserve.bench.serving import main

    raise typer.Exit(main(config))


@bench_app.command("finetune")
@configured("model", "engine", "lora", "finetune", "bench")
def bench_finetune(config: Config, model: Model = None) -> None:
    """Train an adapter, alone or side by side with PEFT and PyTorch; print tokens per second."""
    from jaxserve.bench.finetune import main

    raise typer.Exit(main(config))


@bench_app.command("coserve")
@configured(*Config.model_fields)
def bench_coserve(config: Config, model: Model = None) -> None:
    """Replay the same requests under several ways to share devices with finetuning, at several rates, on the engine
    or simulated."""
    from jaxserve.bench.sweep import main

    raise typer.Exit(main(config))


@bench_app.command("peers")
@configured("model", "engine", "lora", "finetune", "coserve", "bench", "sweep")
def bench_peers(config: Config, model: Model = None) -> None:
    """Co-serve beside transformers and PEFT that take turns on the same processors: same requests, same batches.

    Exit status 1: losses differ.
    """
    from jaxserve.bench.beside_peers import main

    raise typer.Exit(main(config))


@bench_app.command()
def flexllm(
    out: Annotated[str, typer.Option(metavar="DIR", help="Where tables and results go.")] = "runs/flexllm",
    models: Annotated[str, typer.Option(metavar="DIR", help="Folder of the models' directories.")] = "configs/models",
    seconds: Annotated[float, typer.Option(min=5, help="Length of each simulated run.")] = 60.0,
    device: Annotated[list[Device] | None, typer.Option(help="By default the A100 and the H200.")] = None,
    lengths: Annotated[list[Lengths] | None, typer.Option(help="Of the requests; by default both.")] = None,
    trace: Annotated[str | None, typer.Option(metavar="FILE", help="A CSV of arrivals; else made-up ones.")] = None,
) -> None:
    """Rebuild FlexLLM's tables in simulation."""
    from jaxserve.bench.flexllm import main

    devices, requests = [each.value for each in device or ()], [each.value for each in lengths or ()]
    raise typer.Exit(main(out, models, seconds, devices, requests, trace))


@app.command()
@configured("model", "engine", "lora", "finetune")
def plan(
    config: Config,
    model: Model = None,
    device: Annotated[Device, typer.Option(help="The GPU that is planned for; it need not be there.")] = Device.h200,
    layers: Annotated[int | None, typer.Option(min=1, help="Compile so many layers; by default all.")] = None,
    context: Annotated[int, typer.Option(min=0, help="Tokens of each running sequence, for the roofline.")] = 1024,
    all_buckets: Annotated[bool, typer.Option("--all-buckets", help="Compile every step, not the longest.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Compile an engine's steps for a GPU that need not be there: will it fit, and how long must a step take?

    Exit status 1: it does not fit.
    """
    from jaxserve.bench.environment import prepare_environment

    prepare_environment()
    from jaxserve.bench.plan import main

    raise typer.Exit(main(config, device.value, layers, context, all_buckets, as_json))


@bench_app.command()
@configured("model", "engine")
def memory(
    config: Config,
    model: Model = None,
    device: Annotated[Device, typer.Option(help="The GPU that is compiled for; it need not be there.")] = Device.h200,
    length: Annotated[int, typer.Option(min=1, help="Tokens of the sequence.")] = 2048,
    window: Annotated[int, typer.Option(min=1, help="Gradient rows of a step.")] = 512,
    layers: Annotated[
        int | None, typer.Option(min=1, help="Compile so many layers and half as many, and extrapolate.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Compile what finetuning a sequence takes in each of several ways, and print the memory of each."""
    from jaxserve.bench.environment import prepare_environment

    prepare_environment()
    from jaxserve.bench.memory import main

    raise typer.Exit(main(config, device.value, length, window, layers, as_json))


@bench_app.command(
    "gpu", context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False
)
def bench_gpu(context: typer.Context) -> None:
    """Measure kernels and engine on the GPU that is here, on random weights; --smoke runs anywhere."""
    from jaxserve.bench.gpu import main

    raise typer.Exit(main(context.args))


@config_app.command("show")
@configured(*Config.model_fields)
def show(
    config: Config,
    model: Model = None,
    format: Annotated[Format, typer.Option(help="What to write.")] = Format.yaml,
) -> None:
    """Print the resolved configuration, defaults included."""
    print(dump_config(config.model_dump(), format.value), end="")


@app.command()
@configured("model", "engine", "lora", "finetune", "job")
def finetune(
    config: Config,
    model: Model = None,
    data: Annotated[str | None, typer.Argument(metavar="DATA", help="Training data, JSONL.")] = None,
    json_lines: JsonLines = False,
) -> None:
    """Train an adapter; started again after a kill, go on from the last checkpoint."""
    from jaxserve.cli.finetune import main

    raise typer.Exit(main(config, json_lines))


@app.command()
@configured("model", "engine", "lora", "finetune", "job", "coserve", "sampling", "bench")
def coserve(config: Config, model: Model = None, json_lines: JsonLines = False) -> None:
    """Serve requests and train adapters together, in one engine; print and write how both went."""
    from jaxserve.cli.coserve import main

    raise typer.Exit(main(config, json_lines))


@app.command()
def demo(
    out: Annotated[str, typer.Option(metavar="DIR", help="Where the report and the adapters go.")] = "jaxserve-demo",
    seconds: Annotated[float, typer.Option(min=5, max=600, help="Length of the trace.")] = 30.0,
    json_lines: JsonLines = False,
) -> None:
    """Serve bursts of requests from a small model while two adapters learn; needs no network and no files."""
    from jaxserve.cli.demo import main

    raise typer.Exit(main(out, seconds, json_lines))


@jobs_app.command("list")
def list_jobs(
    directories: Annotated[list[str] | None, typer.Argument(metavar="DIR...", help="Looked through.")] = None,
    json_lines: JsonLines = False,
) -> None:
    """List the jobs below directories."""
    from jaxserve.cli.jobs import as_json, find, listing

    found = list(find(directories or ["."]))
    print("\n".join(as_json(*job) for job in found) if json_lines else listing(found))


@jobs_app.command("show")
def show_job(directory: JobDirectory) -> None:
    """Print everything about a job."""
    from jaxserve.cli.jobs import details

    print(details(directory))


@jobs_app.command("events")
def events_of_job(
    directory: JobDirectory,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job is over.")] = False,
    json_lines: JsonLines = False,
) -> None:
    """Print what happened in a job."""
    from jaxserve.cli import jobs

    def show(event: "JobEvent") -> None:
        print(json.dumps(event.to_json()) if json_lines else jobs.event_line(event), flush=True)

    jobs.follow(directory, show, follow)


def _asks(action: str, text: str) -> None:
    def ask(
        directory: JobDirectory,
        timeout: Annotated[float, typer.Option(min=0, help="Seconds to wait until it is done.")] = 30.0,
    ) -> None:
        from jaxserve.cli.jobs import request

        if not request(directory, action, timeout):
            raise EngineError(f"{directory}: asked to {action}, but not done within {timeout:g} s")

    ask.__doc__ = f"{text} The process that runs the job acts between two of its steps."
    jobs_app.command(action)(ask)


_asks("pause", "Pause a job; what it has learnt is saved.")
_asks("resume", "Let a paused job go on.")
_asks("cancel", "End a job for good.")


@app.command()
def version() -> None:
    """Print the version."""
    print(jaxserve.__version__)


def check_answers(config: Config, adapter: str | None, prompts: Sequence[str] = ()) -> None:
    """Refuses what no engine of this configuration could answer, before one is made.

    Raises:
      ConfigError: no model, or an adapter that lora.modules does not name.
      InvalidRequest: prompts or section sampling.
    """
    from jaxserve.models.loader import load_config
    from jaxserve.prompts import prompt_ids

    path, names = model_path(config), [module.name for module in config.lora.modules]
    if adapter is not None and adapter not in names:
        raise ConfigError([f"--adapter: {adapter!r} is not one of lora.modules {names}"])
    vocab_size, tokenizer = load_config(path).vocab_size, tokenizer_of(config)
    config.sampling.params().validate(vocab_size, max_logprobs=config.engine.max_logprobs)
    for prompt in prompts:
        prompt_ids(prompt, tokenizer, vocab_size)


def build_engine(config: Config, room: dict[str, Any]) -> "Engine":
    """The engine of this configuration with its adapters loaded.

    Args:
      room: options that hold where the user left them open.
    """
    with counting("compiling the step's shapes"):
        return load_engine(config, room)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command and leaves the process with its status."""
    try:
        app(args=list(argv) if argv is not None else None, prog_name="jaxserve")
    except JaxServeError as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        sys.exit(exit_status(error))


def exit_status(error: JaxServeError) -> int:
    if isinstance(error, ConfigError | InvalidRequest | DataError | CheckpointMismatch):
        return 2
    return 4 if isinstance(error, ModelError | AdapterError) else 1
