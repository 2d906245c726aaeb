"""The command line, with an engine that answers with its arguments."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar
from unittest.mock import Mock

import numpy as np
import pytest

import jaxserve
from jaxserve.adapters import lora
from jaxserve.adapters.peft_io import save_peft
from jaxserve.assets import locate
from jaxserve.bench.engine import counting
from jaxserve.cli import main, progress
from jaxserve.cli.flags import flags
from jaxserve.config import Config, EngineConfig, resolve
from jaxserve.engine.compiles import tell
from jaxserve.errors import AdapterNotFound, EngineError, InvalidRequest
from jaxserve.finetune.checkpoint import CheckpointWriter
from jaxserve.finetune.folder import CHECKPOINTS
from jaxserve.models.config import ModelConfig
from jaxserve.outputs import Completion, Event, RequestOutput
from jaxserve.sampling import SamplingParams

MODEL = "demo:storyteller"
MODEL_FLAGS = ["--max-num-seqs", "3", "-tp", "2", "--no-enable-prefix-caching"]


class EchoEngine:
    """Answers each prompt with itself in upper case, a character per step."""

    made: ClassVar[list] = []

    def __init__(self, path: str, adapters: dict[str, str], options: dict):
        self.path, self.adapters, self.config, self.asked = path, adapters, EngineConfig(**options), []
        self.default_params = SamplingParams(top_k=20)
        self.tokenizer = SimpleNamespace(chat_template="", apply_chat_template=lambda messages: messages[-1]["content"])
        self.queue: list[Event] = []

    @classmethod
    def from_pretrained(cls, path: str, adapters: dict[str, str], jobs: tuple = (), **options):
        cls.made.append(cls(path, adapters, options))
        return cls.made[-1]

    def generate(self, prompts: list[str], params: SamplingParams, adapter: str | None) -> list[RequestOutput]:
        self.asked.append((prompts, params, adapter))
        return [
            RequestOutput(
                request_id=str(i),
                prompt=prompt,
                prompt_token_ids=[1],
                prompt_logprobs=None,
                adapter=adapter,
                outputs=[
                    Completion(index=0, text=prompt.upper(), error="not finite" if prompt == "nan" else None),
                ],
            )
            for i, prompt in enumerate(prompts)
        ]

    def add_request(self, prompt: str, params: SamplingParams, *, adapter: str | None) -> str:
        if adapter not in (None, *self.adapters):
            raise AdapterNotFound(f"no adapter {adapter!r}")
        if prompt == "long":
            raise InvalidRequest("the prompt is too long")
        self.asked.append((prompt, params, adapter))
        self.queue = [Event(request_id="0", index=0, text=character) for character in prompt.upper()]
        return "0"

    def has_work(self) -> bool:
        return bool(self.queue)

    def step(self) -> list[Event]:
        return [self.queue.pop(0)]


@pytest.fixture
def engines(monkeypatch) -> list[EchoEngine]:
    monkeypatch.setattr(jaxserve, "Engine", EchoEngine, raising=False)
    monkeypatch.setattr(EchoEngine, "made", [])
    return EchoEngine.made


def run(*argv: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    return int(caught.value.code or 0)


# generate


def test_generate_prints_each_text(engines, capsys):
    assert run("generate", MODEL, "--prompt", "a", "--prompt", "b", "--max-tokens", "7", *MODEL_FLAGS) == 0
    assert capsys.readouterr().out == "A\nB\n"
    (engine,) = engines
    assert engine.path == locate(MODEL)
    assert (engine.config.max_num_seqs, engine.config.tensor_parallel) == (3, 2)
    assert not engine.config.enable_prefix_caching
    assert engine.asked == [(["a", "b"], SamplingParams(max_tokens=7, top_k=20), None)]


def test_a_flag_overrides_what_the_model_recommends(engines, capsys):
    assert run("generate", MODEL, "--prompt", "a", "--top-k", "0", "--temperature", "0.5") == 0
    assert engines[0].asked[0][1] == SamplingParams(temperature=0.5)


def test_generate_with_adapters(engines, capsys):
    modules = ["--lora-modules", "math=x/y", "--lora-modules", '{"name": "law", "path": "z"}']
    assert run("generate", MODEL, "--prompt", "a", *modules, "--adapter", "law") == 0
    assert engines[0].adapters == {"math": "x/y", "law": "z"}
    assert engines[0].asked[0][2] == "law"


def test_an_engine_is_as_small_as_its_prompts_and_what_is_given_holds(engines, capsys):
    def sizes(*flags):
        assert run("generate", MODEL, "--prompt", "a", "--prompt", "b", *flags) == 0
        config = engines[-1].config
        return config.max_num_seqs, config.max_num_batched_tokens, config.enable_lora and config.max_loras

    assert sizes() == (2, 64, False)
    assert sizes("--prompt", "c" * 200) == (3, 256, False)
    assert sizes("--prompt", "c" * 2000) == (3, 512, False)
    assert sizes("--n", "3", "--lora-modules", "math=x") == (6, 64, 1)
    assert sizes("--n", "16", "--no-enable-chunked-prefill") == (32, 2048, False)
    assert sizes("--max-num-seqs", "700", "--enable-lora", "--max-loras", "2") == (700, 700, 2)
    assert sizes("--max-num-batched-tokens", "80") == (2, 80, False)


def test_generate_as_json_lines(engines, capsys):
    assert run("generate", MODEL, "--prompt", "é", "--prompt", "b", "--json") == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["prompt"], first["outputs"][0]["text"]) == ("é", "É")
    assert second["request_id"] == "1"


def test_a_failed_request_shows_in_the_exit_status(engines, capsys):
    assert run("generate", MODEL, "--prompt", "nan", "--prompt", "b") == 1
    assert capsys.readouterr() == ("B\n", "error: not finite\n")


def test_a_prompt_of_no_text_is_refused_before_a_model_is_loaded(engines, capsys):
    assert run("generate", MODEL, "--prompt", b"\xff".decode(errors="surrogateescape"), *MODEL_FLAGS) == 2
    assert capsys.readouterr().err == "error: prompt: text must be valid Unicode\n"
    assert not engines


def test_what_no_engine_could_answer_is_refused_before_a_model_is_loaded(engines, capsys, tmp_path):
    assert run("generate", MODEL, "--prompt", "a", "--logprobs", "9", "--max-logprobs", "8") == 2
    assert capsys.readouterr().err == "error: logprobs is '9'; it must be between 0 and 8\n"
    assert run("generate", MODEL, "--prompt", "a", "--stop-token-ids", "[5000]") == 2
    assert "stop_token_ids" in capsys.readouterr().err
    shutil.copy(Path(locate(MODEL)) / "config.json", tmp_path)
    assert run("generate", str(tmp_path), "--prompt", "a") == 2
    assert "this model directory has no tokenizer" in capsys.readouterr().err
    assert not engines


def test_a_config_file_and_overrides(engines, tmp_path):
    (tmp_path / "run.yaml").write_text(f"model: {{path: {MODEL}}}\nengine: {{max_num_seqs: 5, max_queue: 9}}\n")
    assert run("generate", "--config", str(tmp_path / "run.yaml"), "--prompt", "a", "--max-num-seqs", "6") == 0
    assert (engines[0].path, engines[0].config.max_num_seqs, engines[0].config.max_queue) == (locate(MODEL), 6, 9)


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["generate", "m"], "--prompt: at least one"),
        (["generate", "--prompt", "a"], "MODEL: name a model directory"),
        (["generate", MODEL, "--prompt", "a", "--adapter", "law"], "--adapter: 'law' is not one of lora.modules []"),
        (["generate", "m", "--prompt", "a", "--max-queue", "1", "--max-queue", "2"], "--max-queue: given 2 times"),
        (["generate", "m", "--prompt", "a", "--max-queue", "abc"], "--max-queue: engine.max_queue = 'abc'"),
        (["generate", "m", "--prompt", "a", "--num-kv-pages", "0"], "greater than 0"),
        (["generate", "m", "--prompt", "a", "--gpu-memory-utilization", "nan"], "finite number"),
        (["generate", "m", "--prompt", "a", "--pages", "0"], "No such option: --pages"),
        (["generate", "m", "--prompt", "a", "--config", "no.yaml"], "no.yaml: No such file"),
        (["config", "show", "--format", "toml"], "toml"),
        (["frobnicate"], "No such command"),
        (["bench", "serving", "m", "--goodput", "speed:3"], "--goodput: bench.goodput = 'speed:3'"),
        (["bench", "serving", "m", "--goodput", "ttft:1.2.3"], "--goodput: bench.goodput = 'ttft:1.2.3'"),
    ],
)
def test_wrong_usage_is_status_2_and_says_why(engines, capsys, argv, complaint):
    assert run(*argv) == 2
    assert complaint in capsys.readouterr().err
    assert not engines


@pytest.mark.parametrize(
    ("flags", "status", "complaint"),
    [
        (["--rank", "32", "--max-lora-rank", "16"], 2, "rank is 32; max_lora_rank is 16"),
        (["--target-modules", "nope"], 4, "target_modules is 'nope'"),
        (["--start", "no/such/place"], 4, "start 'no/such/place': no adapter of that name"),
    ],
)
def test_an_adapter_that_cannot_be_trained_is_refused_before_a_model_is_loaded(
    engines, capsys, tmp_path, flags, status, complaint
):
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "a"}\n')
    assert (
        run("finetune", "demo:storyteller", str(data), "--adapter", "a", "--output-dir", str(tmp_path / "out"), *flags)
        == status
    )
    assert complaint in capsys.readouterr().err
    assert not engines


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("a/b", "adapter name 'a/b' must be 1 to 64 letters"),
        ("storyteller", "adapter name 'storyteller' is the base model's"),
        ("base", "coserve.jobs: 'base' is the base model, not an adapter"),
    ],
)
def test_a_name_that_no_adapter_can_have_is_refused_before_a_model_is_loaded(engines, capsys, name, complaint):
    assert run("coserve", "demo:storyteller", "--finetune-jobs", f"{name}=demo:pirate") == 2
    assert complaint in capsys.readouterr().err
    assert not engines


@pytest.mark.parametrize("flag", ["--trace", "--prompts"])
def test_a_load_that_is_not_there_is_refused_before_a_model_is_loaded(engines, capsys, flag):
    assert run("coserve", "demo:storyteller", flag, "none.txt") == 2
    assert "none.txt: " in capsys.readouterr().err
    assert not engines


def test_the_adapter_of_a_single_job_is_refused_where_jobs_have_a_list(engines, capsys):
    assert run("coserve", "demo:storyteller", "--adapter", "a") == 2
    assert "job.adapter: the jobs are in coserve.jobs (--finetune-jobs)" in capsys.readouterr().err
    assert not engines


def test_two_jobs_with_one_directory_are_refused_before_a_model_is_loaded(engines, capsys, tmp_path):
    jobs = [{"adapter": name, "data": "demo:pirate", "output_dir": f"{tmp_path}/{way}"} for name, way in ("a.", "b/")]
    flags = [part for job in jobs for part in ("--finetune-jobs", json.dumps(job))]
    assert run("coserve", "demo:storyteller", *flags) == 2
    assert f"{tmp_path} is the output_dir of two jobs" in capsys.readouterr().err
    assert not engines


@pytest.mark.parametrize("command", ["finetune", "coserve"])
def test_a_directory_that_a_job_cannot_have_is_refused_before_a_model_is_loaded(engines, capsys, tmp_path, command):
    where = {
        "finetune": ["demo:pirate", "--adapter", "a", "--output-dir", str(tmp_path / "a")],
        "coserve": ["--finetune-jobs", "a=demo:pirate", "--output-dir", str(tmp_path)],
    }

    def said() -> str:
        assert run(command, "demo:storyteller", *where[command]) in (1, 2)
        return capsys.readouterr().err

    with CheckpointWriter(tmp_path / "a" / CHECKPOINTS, {"adapter": "another"}) as other:
        assert "another process writes checkpoints here" in said()
        other.save(1, {"x": np.zeros(1)}, {})
    assert 'adapter is "another", not "a"' in said()
    shutil.rmtree(tmp_path / "a")
    (tmp_path / "a").touch()
    assert "checkpoints cannot be written here" in said()
    assert not engines


@pytest.mark.parametrize("command", [["finetune", "demo:pirate", "--adapter", "a"], ["coserve"]])
def test_conversations_for_a_model_without_template_are_refused_before_it_is_loaded(engines, capsys, tmp_path, command):
    bare = shutil.copytree(locate(MODEL), tmp_path / "model")
    (bare / "chat_template.jinja").unlink()
    name, *rest = command
    jobs = ["--finetune-jobs", "a=demo:pirate"] if name == "coserve" else ["--output-dir", str(tmp_path / "out")]
    assert run(name, str(bare), *rest, *jobs) == 2
    assert "line 1: messages: the model has no chat template" in capsys.readouterr().err
    assert not engines


def test_a_start_of_another_rank_is_refused_before_a_model_is_loaded(engines, capsys, tmp_path):
    model = ModelConfig.from_dict(json.loads((Path(locate("demo:storyteller")) / "config.json").read_text()))
    weights = lora.initial(lora.new_config(rank=8, alpha=8, target_modules=["q_proj"]), model, np.random.default_rng(0))
    save_peft(weights, tmp_path / "adapter")
    coserved = ["coserve", "demo:storyteller", "--finetune-jobs", "a=demo:pirate", "--start", str(tmp_path / "adapter")]
    assert run(*coserved, "--max-lora-rank", "4") == 2
    assert "rank is 8; max_lora_rank is 4" in capsys.readouterr().err
    assert not engines


def test_every_wrong_flag_is_said_on_a_line_of_its_own(capsys):
    assert run("config", "show", "--max-queue", "x", "--block-size", "0") == 2
    assert [line.split(" = ")[0] for line in capsys.readouterr().err.splitlines()] == [
        "error: --max-queue: engine.max_queue",
        "error: --block-size: engine.block_size",
    ]


def test_a_model_that_cannot_be_served_is_status_4_and_one_line(engines, capsys):
    assert run("generate", "broken", "--prompt", "a") == 4
    assert capsys.readouterr().err == "error: broken: not a model directory\n"
    assert not engines


def test_how_far_the_compiler_is_is_said_now_and_then():
    lines = []
    with counting("compiling", lines.append, seconds=0.0), counting("rarely", lines.append, seconds=60.0):
        tell(1, 3)
        tell(2, 3)
    tell(3, 3)
    assert lines == ["compiling: 1 of 3 programs", "compiling: 2 of 3 programs"]


def test_an_engine_failure_is_status_1(engines, capsys, monkeypatch):
    def fail(self, *args, **kwargs):
        raise EngineError("the device is gone")

    monkeypatch.setattr(EchoEngine, "generate", fail)
    assert run("generate", MODEL, "--prompt", "a") == 1
    assert capsys.readouterr().err == "error: the device is gone\n"


# chat


def chat(monkeypatch, *lines: str, argv: tuple[str, ...] = ()) -> int:
    typed = iter(lines)

    def read(prompt: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    return run("chat", MODEL, *argv)


def test_chat_streams_answers_until_end_of_file(engines, capsys, monkeypatch):
    assert chat(monkeypatch, "hello", "", "again") == 0
    assert capsys.readouterr().out == "HELLO\nAGAIN\n\n"
    assert [params.max_tokens for _, params, _ in engines[0].asked] == [None, None]


def test_chat_changes_adapters_and_survives_refusals(engines, capsys, monkeypatch):
    lines = ("/adapter law", "hi", "/adapter nobody", "hi", "/adapter", "long", "/reset", "ok")
    assert chat(monkeypatch, *lines, argv=("--lora-modules", "law=x", "--max-tokens", "5")) == 0
    captured = capsys.readouterr()
    assert captured.out == "HI\nOK\n\n"
    assert captured.err == "error: no adapter 'nobody'\nerror: the prompt is too long\n"
    assert engines[0].asked == [
        ("hi", SamplingParams(max_tokens=5, top_k=20), "law"),
        ("ok", SamplingParams(max_tokens=5, top_k=20), None),
    ]


def test_chat_of_no_text_is_one_line(engines, capsys, monkeypatch):
    broken = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
    monkeypatch.setattr("builtins.input", Mock(side_effect=broken))
    assert run("chat", MODEL) == 2
    assert capsys.readouterr().err == "error: what is read is not utf-8: invalid start byte\n"


def test_chat_remembers_the_conversation_until_reset(engines, monkeypatch):
    seen = []

    def template(messages, **variables):
        seen.append([(m["role"], m["content"]) for m in messages] + list(variables.items()))
        return messages[-1]["content"]

    make = EchoEngine.from_pretrained.__func__  # pyright: ignore

    def from_pretrained(cls, path, **options):
        engine = make(cls, path, **options)
        engine.tokenizer.apply_chat_template = template
        return engine

    monkeypatch.setattr(EchoEngine, "from_pretrained", classmethod(from_pretrained))
    chat(monkeypatch, "a", "b", "/reset", "c")
    assert seen == [[("user", "a")], [("user", "a"), ("assistant", "A"), ("user", "b")], [("user", "c")]]
    chat(monkeypatch, "d", argv=("--chat-template-kwargs", '{"enable_thinking": false}'))
    assert seen[3:] == [[("user", "d"), ("enable_thinking", False)]]


@pytest.mark.parametrize("given", ["{", "[]", '{"messages": []}'])
def test_what_are_no_names_for_a_template_is_refused_before_a_model_is_loaded(engines, capsys, given):
    assert run("chat", MODEL, "--chat-template-kwargs", given) == 2
    assert capsys.readouterr().err.startswith("error: --chat-template-kwargs: ")
    assert not engines


def test_chat_refuses_several_answers_and_a_model_without_template(engines, capsys, monkeypatch, tmp_path):
    assert chat(monkeypatch, "a", argv=("--n", "2")) == 2
    assert capsys.readouterr().err == "error: sampling.n 2: a conversation goes on from one answer\n"
    assert not engines
    bare = shutil.copytree(locate(MODEL), tmp_path / "model")
    (bare / "chat_template.jinja").unlink()
    assert run("chat", str(bare)) == 2
    assert capsys.readouterr().err == "error: this model directory has no chat template\n"
    assert not engines


# config show, version, start-up


@pytest.mark.parametrize("format", ["yaml", "gin"])
def test_what_config_show_prints_is_a_fixed_point(tmp_path, capsys, format):
    path = tmp_path / f"shown.{format}"
    flags = ["-tp", "4", "--lora-modules", "a=b", "--stop", '["x", "y"]', "--logit-bias", '{"3": 1.5}']
    assert run("config", "show", "m", "--format", format, *flags) == 0
    shown = capsys.readouterr().out
    path.write_text(shown)
    assert run("config", "show", "--config", str(path), "--format", format) == 0
    assert capsys.readouterr().out == shown
    assert resolve(path, {}).engine.tensor_parallel == 4


def test_config_show_as_json_has_every_section(capsys):
    assert run("config", "show", "--format", "json") == 0
    assert set(json.loads(capsys.readouterr().out)) == set(Config.model_fields)


def test_no_two_keys_share_a_flag():
    names = [name for flag in flags(*Config.model_fields) for name in flag.names]
    own = ["--prompt", "--json", "--config", "--help", "-h", "--format"]
    assert len(set(names + own)) == len(names + own)
    assert "--adapter" not in [name for flag in flags("model", "engine", "lora", "sampling") for name in flag.names]


def test_every_flag_says_what_it_does():
    assert [flag.names for flag in flags(*Config.model_fields) if not flag.field.description] == []


def test_a_flag_that_takes_one_of_a_few_words_names_them(capsys):
    assert run("coserve", "--help") == 0
    assert "--finetune-remat none|elementwise|attention|full" in " ".join(capsys.readouterr().out.split())


def test_a_run_that_ends_in_an_error_gives_the_terminal_its_cursor_back(monkeypatch, capfd):
    """What is registered for the end of the process does."""
    at_exit = []
    monkeypatch.setattr(progress.atexit, "register", at_exit.append)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    speeds = {"output_tokens_per_s": 0.0, "finetune_tokens_per_s": 1.0}
    state = {"at": 1.0, "requests": 0, "done": 0, "attainment": None, "jobs": [], **speeds}
    shown = progress.LiveProgress()
    for _ in range(2):
        shown.update(state)
    for function in at_exit:
        function()
    out = capfd.readouterr().out
    assert out.count("\x1b[?25l") == 1
    assert out.count("\x1b[?25h") == 1


def test_help_needs_no_jax_and_the_module_runs():
    run_module = "runpy.run_module('jaxserve', run_name='__main__')"
    code = f"import runpy, sys\ntry: {run_module}\nfinally: print('jax' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, "--help"],
        check=True,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        cwd=Path(__file__).parents[2],
    )
    assert "generate" in done.stdout
    assert done.stdout.splitlines()[-1] == "False"


def test_version(capsys):
    assert run("version") == 0
    assert capsys.readouterr().out.strip() == jaxserve.__version__
