"""Configuration: four sources, one frozen model, every problem at once."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from jaxserve.config import Config, EngineConfig, Entry, dump_config, load_config_file, resolve
from jaxserve.config.schema import LoraModule
from jaxserve.errors import ConfigError
from jaxserve.sampling import SamplingParams

YAML = """
engine:
  max_num_seqs: 8
  gpu_memory_utilization: 0.5
lora:
  modules: [math=adapters/math]
sampling:
  stop: ["\\n\\n", END]
"""
GIN = """
SEQS = 8
engine.max_num_seqs = %SEQS
engine.gpu_memory_utilization = 0.5
lora.modules = ['math=adapters/math']
sampling:
  stop = ['\\n\\n', 'END']
"""


def written(folder: Path, text: str, suffix: str = ".yaml") -> Path:
    path = folder / f"run{suffix}"
    path.write_text(text)
    return path


def refusal(path: Path | None = None, environ: dict | None = None, flags: dict | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        resolve(path, environ or {}, flags)
    return [line.replace(f"{path}", path.name if path else "") for line in caught.value.errors]


# what wins


def test_yaml_and_gin_end_in_the_same_config(tmp_path):
    config = resolve(written(tmp_path, YAML), {})
    assert config == resolve(written(tmp_path, GIN, ".gin"), {})
    assert config.engine.max_num_seqs == 8
    assert config.lora.modules == (LoraModule("math", "adapters/math"),)
    assert config.sampling.params() == SamplingParams(stop=["\n\n", "END"])


def test_flags_win_over_environment_over_file_over_defaults(tmp_path):
    file = written(tmp_path, "engine: {max_num_seqs: 3, block_size: 3, max_queue: 3}\n")
    environ = {"JAXSERVE_ENGINE__MAX_NUM_SEQS": "2", "JAXSERVE_ENGINE__BLOCK_SIZE": "2"}
    flags = {("engine", "max_num_seqs"): Entry("1", "--max-num-seqs")}
    engine = resolve(file, environ, flags).engine
    assert (engine.max_num_seqs, engine.block_size, engine.max_queue) == (1, 2, 3)
    assert engine.max_num_batched_tokens == Config().engine.max_num_batched_tokens


def test_the_processs_environment_is_read_by_default(monkeypatch):
    monkeypatch.setenv("JAXSERVE_MODEL__MAX_MODEL_LEN", "77")
    assert resolve().model.max_model_len == 77


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("ENGINE__ENABLE_PREFIX_CACHING", "false", False),
        ("ENGINE__GPU_MEMORY_UTILIZATION", "5e-1", 0.5),
        ("ENGINE__NUM_KV_PAGES", "none", None),
        ("FINETUNE__FINETUNE_REMAT", "none", "none"),
        ("FINETUNE__FINETUNE_REMAT", "null", None),
        ("MODEL__PATH", "123", "123"),
        ("LORA__MODULES", '["a=b=c"]', (LoraModule("a", "b=c"),)),
        ("LORA__MODULES", '["{\\"name\\": \\"a\\", \\"path\\": \\"b\\"}"]', (LoraModule("a", "b"),)),
        ("SAMPLING__STOP", "[END]", "[END]"),
        ("SAMPLING__STOP", '["a", "b"]', ["a", "b"]),
        ("SAMPLING__LOGIT_BIAS", '{"3": -1.5}', {3: -1.5}),
    ],
)
def test_text_becomes_the_type_of_its_key(name, text, value):
    section, key = name.lower().split("__")
    assert getattr(getattr(resolve(None, {f"JAXSERVE_{name}": text}), section), key) == value


def test_other_variables_of_ours_are_not_configuration():
    assert resolve(None, {"JAXSERVE_DEBUG": "1", "OTHER_ENGINE__X": "1"}) == Config()


# what is refused


def test_every_problem_of_every_source_is_said_at_once(tmp_path):
    file = written(
        tmp_path,
        "engine:\n  max_num_seqs: lots\n  max_seqs: 3\n  block_size: '16'\nmodl: {a: 1}\nlora:\n  modules: [a=b, c]\n",
    )
    lines = refusal(
        file,
        {"JAXSERVE_ENGINE__MAX_QUEUE": "x", "JAXSERVE_ENGIN__Y": "1"},
        {("engine", "tensor_parallel"): Entry("0", "--tensor-parallel-size")},
    )
    assert sorted(lines) == [
        "--tensor-parallel-size: engine.tensor_parallel = 0: it should be greater than 0",
        "JAXSERVE_ENGINE__MAX_QUEUE: engine.max_queue = 'x': it should be a valid integer, "
        "unable to parse string as an integer",
        "JAXSERVE_ENGIN__Y: engin = {'y': '1'}: unknown key; did you mean engine?",
        "run.yaml:2: engine.max_num_seqs = 'lots': it should be a valid integer",
        "run.yaml:3: engine.max_seqs = 3: unknown key; did you mean max_num_seqs?",
        "run.yaml:4: engine.block_size = '16': it should be a valid integer",
        "run.yaml:5: modl = {'a': 1}: unknown key; did you mean model?",
        "run.yaml:7: lora.modules = 'c': an adapter is written name=path",
    ]


def test_a_misspelt_key_gives_the_same_error_in_yaml_and_gin(tmp_path):
    yaml = refusal(written(tmp_path, "engine:\n  max_seqs: 3\n"))
    gin = refusal(written(tmp_path, "\nengine.max_seqs = 3\n", ".gin"))
    assert yaml == [line.replace(".gin", ".yaml") for line in gin]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("engine: {max_num_seqs: 1.0}", "valid integer"),
        ("engine: {max_num_seqs: true}", "valid integer"),
        ("engine: {enable_prefix_caching: 1}", "valid boolean"),
        ("engine: {enable_prefix_caching: yes}", "valid boolean"),
        ("engine: {gpu_memory_utilization: .nan}", "finite number"),
        ("engine: {gpu_memory_utilization: 1.5}", "less than or equal to 1"),
        ("engine: {max_num_seqs: 9, max_num_batched_tokens: 8}", "max_num_batched_tokens 8 is below max_num_seqs 9"),
        ("engine: 3", "valid dictionary"),
        ("lora: {max_loras: 9, max_cpu_loras: 8}", "max_cpu_loras 8 is below max_loras 9"),
        ("lora: {modules: [a=b, a=c]}", "modules name 'a' twice"),
        ("lora: {modules: [=c]}", "name=path"),
        ("sampling: {temperature: 2.5}", "temperature is '2.5'"),
        ("sampling: {stop: [1]}", "valid string"),
        ("finetune: {slo_classes: [[a, -5.0]]}", "slo_classes = -5.0: it should be greater than 0"),
        ("finetune: {slo_classes: [['', 5.0]]}", "at least 1 character"),
        ("model: {dtype: int8}", "'auto', 'float32', 'bfloat16' or 'float16'"),
        ('coserve: {results_dir: "a\\0b"}', "must not hold NUL"),
        ("bench: {trace: ''}", "at least 1 character"),
        ("1: {a: 2}", "unknown key"),
    ],
)
def test_a_wrong_value_is_refused_with_its_file(tmp_path, text, complaint):
    (line,) = refusal(written(tmp_path, text))
    assert line.startswith("run.yaml:1: ")
    assert complaint in line


def test_a_long_value_is_cut_in_the_message(tmp_path):
    (line,) = refusal(written(tmp_path, f"model: {{dtype: {'x' * 5000}}}"))
    assert len(line) < 250


def test_engine_config_refuses_all_wrong_fields_at_once():
    with pytest.raises(ConfigError) as caught:
        EngineConfig(max_num_seqs="many", max_modl_len=3)
    assert caught.value.errors == [
        "max_num_seqs = 'many': it should be a valid integer",
        "max_modl_len = 3: unknown key; did you mean max_model_len?",
    ]


def test_the_config_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        Config().engine.max_num_seqs = 3  # pyright: ignore


def test_engine_config_holds_what_the_sections_say():
    config = resolve(None, {"JAXSERVE_MODEL__SEED": "5", "JAXSERVE_LORA__MAX_LORAS": "3", "JAXSERVE_MODEL__PATH": "m"})
    engine = config.engine_config()
    assert (engine.seed, engine.max_loras, engine.max_num_seqs) == (5, 3, config.engine.max_num_seqs)
    assert not {"path", "modules"} & set(EngineConfig.model_fields)


# hostile files


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("engine:\n\tblock_size: 3\n", ":2: "),
        ("engine: {block_size: 3}\nengine: {block_size: 4}\n", ":2: found duplicate key"),
        ("engine:\n  block_size: 3\n  block_size: 4\n", ":3: found duplicate key"),
        ("a: &a [1]\nb: *a\n", ":1: anchors and aliases"),
        ("a: !!python/object/apply:os.system ['true']\n", ":1: could not determine a constructor"),
        ("a: " + "[" * 2000, ":1: nested deeper than 16"),
        ("engine: {}\n---\nengine: {}\n", ":2: a second document"),
        ("%YAML 1.1\n---\nengine: {enable_prefix_caching: yes}\n", "directives are not allowed"),
        ("- 1\n", "must be a mapping"),
        ("a: 2026-13-45\n", "month must be in 1..12"),
        ("engine: {block_size: 3", "expected"),
        ("engine:\n  ? [a, b]\n  : 3\n", ":2: a key must be a name"),
        ("? [a, b]\n: {c: 3}\n", ":1: a key must be a name"),
        ("a: \x00", "special characters are not allowed"),
    ],
)
def test_hostile_yaml_is_refused_in_one_line(tmp_path, text, complaint):
    (line,) = refusal(written(tmp_path, text))
    assert line.startswith("run.yaml")
    assert line.count("run.yaml") == 1
    assert complaint in line


@pytest.mark.parametrize("content", ["", " {}", " # max_num_seqs: 4"])
def test_a_section_without_keys_is_still_one_that_there_must_be(tmp_path, content):
    (line,) = refusal(written(tmp_path, f"model: {{seed: 3}}\nengin:{content}\n"))
    assert line == "run.yaml:2: engin = {}: unknown key; did you mean engine?"
    assert resolve(written(tmp_path, f"model: {{seed: 3}}\nengine:{content}\n"), {}).model.seed == 3


def test_yaml_reads_numbers_by_the_rules_of_yaml_1_2(tmp_path):
    engine = load_config_file(written(tmp_path, "engine: {a: 1e-4, b: on, c: 0o22, d: 022}\n"))["engine"]
    assert engine == {"a": 1e-4, "b": "on", "c": 18, "d": 22}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("import os\n", "run.gin:1: import os: imports are not allowed"),
        ("from os import system\n", "run.gin:1: import os.system: imports are not allowed"),
        ("include '/etc/passwd'\n", "outside the folder"),
        ("include '../other.gin'\n", "outside the folder"),
        ("include 'missing.gin'\n", "No such file"),
        ("include 'run.gin'\n", "includes itself"),
        ("engine.block_size = @f()\n", "run.gin:1: @f(): references"),
        ("engine.block_size = @engine\n", "run.gin:1: @engine: references"),
        ("engine.block_size = 1\nengine.block_size = 2\n", "run.gin:2: engine.block_size: bound twice"),
        ("x/engine.block_size = 1\n", "x/engine.block_size: scopes are not allowed"),
        ("foo.bar = 1\n", "run.gin:1: foo = {'bar': 1}: unknown key"),
        ("block_size = 1\n", "run.gin:1: block_size: no section.key, and no macro in use"),
        ("engine.block_size = %NONE\n", "%NONE is not defined"),
        ("A = %B\nB = %A\nengine.block_size = %A\n", "is defined by itself"),
        ("engine.block_size = \n", "run.gin:1: "),
        ("engine.block_size = [\n", "run.gin"),
        ("engine.block_size = open('x')\n", "run.gin:1: "),
        ("engine.block_size = " + "[" * 5000 + "\n", "run.gin"),
        ("engine.block_size = " + "9" * 5000 + "\n", "run.gin"),
        ("  engine.block_size = 1\n    oops\n", "run.gin"),
    ],
)
def test_hostile_gin_is_refused_in_one_line(tmp_path, text, complaint):
    (line,) = refusal(written(tmp_path, text, ".gin"))
    assert complaint in line


def test_gin_includes_what_lies_beside_it_and_overrides_it(tmp_path):
    (tmp_path / "base.gin").write_text("engine.block_size = 8\nengine.max_queue = 9\n")
    file = written(tmp_path, "include 'base.gin'\nengine.block_size = 16\n", ".gin")
    assert load_config_file(file) == {"engine": {"block_size": 16, "max_queue": 9}}


def test_a_wrong_value_in_an_include_names_the_included_file(tmp_path):
    (tmp_path / "base.gin").write_text("\nengine.block_size = 'x'\n")
    (line,) = refusal(written(tmp_path, "include 'base.gin'\n", ".gin"))
    assert line.startswith(f"{tmp_path / 'base.gin'}:2: engine.block_size")


@pytest.mark.parametrize(
    ("name", "data", "complaint"),
    [
        ("run.toml", b"", "ends in .yaml, .yml or .gin"),
        ("run.yaml", b"a: \xff\n", "not UTF-8 at byte 3"),
        ("big.yaml", b"# " + b"x" * 2**20, "larger than"),
        ("big.gin", b"# " + b"x" * 2**20, "larger than"),
    ],
)
def test_a_file_that_is_no_text_config_is_refused(tmp_path, name, data, complaint):
    (tmp_path / name).write_bytes(data)
    (line,) = refusal(tmp_path / name)
    assert complaint in line


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    assert "No such file" in refusal(tmp_path / "no.yaml")[0]
    (tmp_path / "d.yaml").mkdir()
    assert "directory" in refusal(tmp_path / "d.yaml")[0]


def test_an_empty_file_is_the_defaults(tmp_path):
    assert resolve(written(tmp_path, "engine:\n  # max_num_seqs: 3\n"), {}) == Config()
    assert resolve(written(tmp_path, "", ".gin"), {}) == Config()


# writing

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
PLACES = TEXTS.filter(lambda text: "\0" not in text)
NUMBERS = st.floats(0.001, 2.0) | st.sampled_from([1e-9, 1.0, 0.1])


@st.composite
def configs(draw) -> Config:
    sampling = {
        "stop": draw(st.none() | TEXTS | st.lists(TEXTS, max_size=3)),
        "temperature": draw(NUMBERS),
        "logit_bias": draw(st.none() | st.dictionaries(st.integers(0, 9), st.floats(-100, 100), max_size=3)),
        "seed": draw(st.none() | st.integers(0, 2**63)),
    }
    names = draw(st.lists(TEXTS.filter(lambda t: "=" not in t and t[0] != "{"), unique=True, max_size=3))
    objectives = NUMBERS | st.sampled_from([500.0, 1234.567, 1e6, 1e17])
    return Config(
        model={"path": draw(st.none() | PLACES), "seed": draw(st.integers(0, 9))},
        engine={"enable_prefix_caching": draw(st.booleans())},
        lora={"modules": [f"{name}={draw(TEXTS)}" for name in names]},
        finetune={"slo_classes": [(name, draw(objectives), draw(st.none() | objectives)) for name in names]},
        sampling=sampling,
    )  # pyright: ignore


@pytest.mark.parametrize("suffix", ["yaml", "gin"])
@given(config=configs())
def test_what_is_shown_reads_back_as_the_same_config(tmp_path_factory, suffix, config):
    path = tmp_path_factory.getbasetemp() / f"shown-{os.getpid()}.{suffix}"
    text = dump_config(config.model_dump(), suffix)
    path.write_text(text)
    again = resolve(path, {})
    assert again == config
    assert dump_config(again.model_dump(), suffix) == text


def test_json_is_for_other_programs():
    assert json.loads(dump_config(Config().model_dump(), "json"))["engine"]["max_num_seqs"] == 64


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[2].glob("configs/*.*")), ids=lambda p: p.name)
def test_every_config_in_the_repository_is_valid(path):
    assert resolve(path, {}) != Config()
