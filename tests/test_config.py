"""Settings: every published config loads, mistakes are refused by name, help describes every key."""

import dataclasses
import re
from pathlib import Path

import pytest

from biomamba_jax.command_line import parse, run_command, to_yaml
from biomamba_jax.config import (
    DataConfig,
    EvaluateConfig,
    FinetuneConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    PrepareConfig,
    PretrainConfig,
)
from biomamba_jax.config.generate import GenerateConfig
from biomamba_jax.config.plan import PlanConfig
from biomamba_jax.errors import UserError

CONFIGS = Path(__file__).parents[1] / "configs"
COMMANDS = (PretrainConfig, FinetuneConfig, EvaluateConfig, PrepareConfig, PlanConfig, GenerateConfig)
SCHEMAS = {"finetune": FinetuneConfig, "evaluate": EvaluateConfig}  # by how a file's name begins; else pretraining
FOLDERS = {"text_mining": FinetuneConfig}
GIVEN = {"text_mining": ["--init_from", "weights"], "reproduce/evaluate": ["--models.general", "run"]}
"""Arguments that a config needs beside it, by its folder or its path."""


def read(*argv: str) -> PretrainConfig:
    return parse(PretrainConfig, argv)


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_in_the_project_is_valid(path):
    schema = FOLDERS.get(path.parent.name) or SCHEMAS.get(path.stem.partition("_")[0], PretrainConfig)
    given = GIVEN.get(path.parent.name) or GIVEN.get(f"{path.parent.name}/{path.stem}", [])
    parse(schema, ["--config", str(path), *given])


def parameters(model: ModelConfig) -> int:
    """From the shapes of the released weights."""
    d, e, n, k = model.d_model, model.d_inner, model.state_size, model.d_conv
    if model.kind == "mamba1":
        mixer = 2 * d * e + e * k + e + e * (model.dt_size + 2 * n) + model.dt_size * e + e + e * n + e + e * d
    else:
        c = e + 2 * model.n_groups * n
        mixer = d * (2 * e + 2 * model.n_groups * n + model.n_heads) + c * k + c + 3 * model.n_heads + e + e * d
    return model.padded_vocab * d + model.n_layers * (mixer + d) + d


@pytest.mark.parametrize(
    ("name", "kind", "millions", "rows"),
    [
        ("mamba1_130m", "mamba1", 129, 50280),
        ("mamba1_370m", "mamba1", 372, 50280),
        ("mamba1_790m", "mamba1", 793, 50280),
        ("mamba1_1.4b", "mamba1", 1372, 50280),
        ("mamba1_2.8b", "mamba1", 2768, 50280),
        ("mamba2_130m", "mamba2", 129, 50288),
        ("mamba2_370m", "mamba2", 368, 50288),
        ("mamba2_780m", "mamba2", 780, 50288),
        ("mamba2_1.3b", "mamba2", 1344, 50288),
        ("mamba2_2.7b", "mamba2", 2703, 50288),
    ],
)
def test_published_sizes_have_the_published_numbers_of_parameters(name, kind, millions, rows):
    model = read("--config", str(CONFIGS / f"{name}.yaml")).model
    assert (model.kind, model.padded_vocab) == (kind, rows)
    assert round(parameters(model) / 1e6) == millions


def test_an_override_wins_over_the_file():
    config = read("--config", str(CONFIGS / "quickstart.yaml"), "--optimizer.learning_rate", "3e-4")
    assert config.optimizer.learning_rate == 3e-4


def test_an_override_wins_over_a_file_that_is_named_after_it():
    config = read("--model.d_model", "64", "--config", str(CONFIGS / "quickstart.yaml"))
    assert config.model.d_model == 64


@pytest.mark.parametrize(
    "words",
    [
        ("a.txt", "b c.txt"),
        ("[a.txt, b c.txt]",),
        ("a.txt", "--prepare.input", "b c.txt"),
        ("[x, y]", "--prepare.input=[a.txt, b c.txt]"),
    ],
)
def test_a_list_is_written_with_spaces_or_brackets_or_its_key_again(words):
    config = read("--prepare.input", *words, "--train.steps", "3")
    assert (config.prepare.input, config.train.steps) == (["a.txt", "b c.txt"], 3)


def test_a_switch_alone_means_true_also_as_the_last_word():
    config = read(
        "--checkpoint.keep_best", "--prepare.require-pmcid", "--tensorboard", "false", "--prepare.keep_retracted"
    )
    assert config.checkpoint.keep_best and config.prepare.require_pmcid and config.prepare.keep_retracted
    assert not config.tensorboard


def test_values_that_look_like_numbers_or_words_of_yaml_stay_text_in_lists():
    assert read("--prepare.languages", "no", "1", "null").prepare.languages == ["no", "1", "null"]


def test_a_text_or_list_of_texts_takes_both_and_names_keep_their_hyphens():
    def domain(*words: str) -> str | list[str]:
        argv = ["--models.m", "x", "--domains.made-up.path", *words]
        return parse(EvaluateConfig, argv).domains["made-up"].path

    assert (domain("a"), domain("a", "b"), domain("[a, b]")) == ("a", ["a", "b"], ["a", "b"])


def test_a_mapping_without_a_name_is_told_how_to_name_its_entry():
    with pytest.raises(UserError, match=r"unknown key '--model'; did you mean '--models\.NAME'"):
        parse(EvaluateConfig, ["--model", "x"])


@pytest.mark.parametrize("line", ["model: [1]", "optimizer: 3", "train: [a, b]", "data: {mixture: 5}"])
def test_a_group_in_a_file_that_is_not_a_mapping_is_named(tmp_path, line):
    (tmp_path / "config.yaml").write_text(line + "\n")
    with pytest.raises(UserError, match=f"{line.split(':')[0]}.*must be a mapping"):
        read("--config", str(tmp_path / "config.yaml"))


def test_a_config_survives_being_written_and_read(tmp_path):
    config = read("--model.d_model", "128", "--train.steps", "7", "--optimizer.learning_rate", "1e-5")
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert read("--config", str(tmp_path / "config.yaml")) == config


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--model.d_modle", "5"), "unknown key '--model.d_modle'; did you mean '--model.d_model'?"),
        (("--optimiser.learning_rate", "1"), "did you mean '--optimizer.learning_rate'?"),
        (("--model.d_model", "wide"), "model.d_model = wide: must be an integer"),
        (("--train.steps", "many"), "train.steps = many: must be an integer or null"),
        (("--tensorboard", "perhaps"), "tensorboard = perhaps: must be true or false"),
        (("--train.steps",), "--train.steps: give a value"),
        (("--data.mixture.sources.a", "{path: p, weight: x}"), "data.mixture.sources.a.weight = x: must be a number"),
        (("quickstart.yaml",), "'quickstart.yaml' is not an option; write --KEY VALUE, or --config FILE"),
        (("--model.d_model", "-5"), "model.d_model = -5: must be at least 1"),
        (("--model.headdim", "7"), "model.headdim = 7: must divide"),
        (("--train.epochs", "0"), "train.epochs = 0.0: must be above 0"),
        (("--train.accumulation", "3"), "train.accumulation = 3: must divide"),
        (("--schedule.kind", "step"), "schedule.kind = step: must be 'cosine' or 'linear' or 'wsd' or 'constant'"),
        (("--config", "missing.yaml"), "missing.yaml: cannot be read (No such file or directory)"),
        (("--train.steps", "1.5"), "train.steps = 1.5: must be an integer or null"),
        (("--train.steps", "true"), "train.steps = true: must be an integer or null"),
        (("--train.steps=",), "train.steps = : must be an integer or null"),
        (("--model", "mamba1"), "model = mamba1: must be a mapping with keys such as kind"),
        (("--train.compiler_options", "[1]"), "train.compiler_options = [1]: must be a mapping"),
        (("--data.mixture.sources.a.weight", "2"), "--data.mixture.sources.a.path is missing: Folder of shards"),
        (("--data.mixture.sources.a.pth", "x"), "did you mean '--data.mixture.sources.a.path'?"),
        (("--learning_rate", "1"), "did you mean '--optimizer.learning_rate'?"),
        (("--optimizer.clip", "-1"), "optimizer.clip = -1.0: must be 0 or more"),
        (("--schedule.final_fraction", "-1"), "schedule.final_fraction = -1.0: must be in [0, 1]"),
        (
            ("--schedule.kind", "wsd", "--schedule.warmup_fraction", "0.5", "--schedule.stable_fraction", "0.6"),
            "schedule.warmup_fraction + stable_fraction = 1.1: must be at most 1",
        ),
        (("--train.eval_batches", "0"), "train.eval_batches = 0: must be at least 1"),
        (("--train.seed", "-1"), "train.seed = -1: must be in 0..2^32 - 1"),
        (("--evaluate.seed", "-1"), "evaluate.seed = -1: must be in 0..2^32 - 1"),
        (("--optimizer.learning_rate", ".inf"), "optimizer.learning_rate = inf: must be above 0, and finite"),
        (("--model.d_model", str(2**63)), f"model.d_model = {2**63}: must be at least 1, below 2^31"),
        (("--train.steps", str(2**31)), f"train.steps = {2**31}: must be at least 1, below 2^31"),
        (("--loss.z_loss", ".inf"), "loss.z_loss = inf: must be 0 or more, and finite"),
        (("--run_dir", "a\udcff"), "run_dir: 'a\\udcff' is not valid Unicode"),
        (("--prepare.recent_from", "2024-W01-1"), "must be a date such as 2024-01-31"),
        (("--loss.chunk_size", "0"), "loss.chunk_size = 0: must be at least 1"),
        (("--model.d_state", "-4"), "model.d_state = -4: must be at least 1"),
        (
            ("--run_dir", "gs://bucket/run"),
            "run_dir = 'gs://bucket/run': must be a folder of a file system, since files are appended, locked and",
        ),
    ],
)
def test_a_mistake_is_refused_by_name(argv, message):
    with pytest.raises(UserError) as refusal:
        read(*argv)
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (ModelConfig, {"d_model": -1}, "model.d_model = -1: must be at least 1"),
        (ModelConfig, {"d_conv": 1}, "model.d_conv = 1: must be at least 2"),
        (OptimizerConfig, {"beta2": 1.0}, "optimizer.beta2 = 1.0: must be in [0, 1)"),
        (OptimizerConfig, {"learning_rate": float("nan")}, "optimizer.learning_rate = nan: must be above 0"),
        (MeshConfig, {"fsdp": 0}, "mesh.fsdp = 0: must be at least 1, or -1"),
        (DataConfig, {"batch_size": 0}, "data.batch_size = 0: must be at least 1"),
        (PrepareConfig, {"near_duplicates": 0.0}, "prepare.near_duplicates = 0.0: must be in (0, 1]"),
        (PrepareConfig, {"recent_from": "2024"}, "prepare.recent_from = '2024': must be a date such as 2024-01-31"),
        (LoraConfig, {"targets": []}, "lora.targets = []: must be a list of at least one name"),
    ],
)
def test_a_value_outside_its_limits_is_refused_in_python_too(section, values, message):
    with pytest.raises(UserError, match=re.escape(message)):
        section(**values)


def test_the_ends_of_a_closed_interval_are_accepted():
    config = read("--schedule.final_fraction", "1", "--optimizer.layer_decay", "1", "--train.seed", str(2**32 - 1))
    assert (config.schedule.final_fraction, config.optimizer.layer_decay, config.train.seed) == (1, 1, 2**32 - 1)


def test_a_mistyped_key_in_a_file_is_refused_with_the_nearest_right_one(tmp_path):
    (tmp_path / "config.yaml").write_text("data: {sequence_lenght: 5}\n")
    with pytest.raises(UserError, match=r"unknown key 'data\.sequence_lenght'; did you mean 'data\.sequence_length'"):
        read("--config", str(tmp_path / "config.yaml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "config.yaml: is not a mapping of settings"),
        ("- train", "config.yaml: is not a mapping of settings"),
        ("train: {steps: 1", "config.yaml, line 1: cannot be read as YAML"),
        ("train:\n\tsteps: 1", "config.yaml, line 2: cannot be read as YAML"),
        ("train: {steps: 1}\ntensorboard: false\ntrain: {epochs: 2}", "config.yaml, line 3: .*'train' twice"),
        ("data: {mixture: {sources: {a: x}}}", "data.mixture.sources.a = x: must be a mapping with keys such as path"),
        ("data: {mixture: {sources: [x]}}", r"data.mixture.sources = \['x'\]: must be a mapping"),
        ("model: null", "model = None: must be a mapping"),
        ("prepare: {input: a.txt}", "prepare.input = a.txt: must be a list"),
        ("prepare: {input: [1]}", "prepare.input = 1: must be a string"),
        ("run_dir: 5", "run_dir = 5: must be a string"),
        ("train: {steps: {a: b}}", "train.steps = .*: must be an integer or null"),
        ("5: b", "unknown key '5'"),
        ('run_dir: "a\\0b"', r"run_dir = 'a\\x00b': holds a null character"),
        ('prepare: {input: ["a\\ud83d"]}', r"prepare\.input: 'a\\ud83d' is not valid Unicode"),
        ('data: {mixture: {sources: {"a\\0": {path: x}}}}', "holds a null character"),
        ("{[1]: 2}", "config.yaml, line 1: cannot be read as YAML"),
        ("a: \x00", "config.yaml: cannot be read as YAML"),
        ("{" * 5000, "config.yaml.*: cannot be read as YAML"),
    ],
)
def test_what_a_file_says_is_believed_or_refused_in_plain_words(tmp_path, text, message):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as refusal:
        read("--config", str(tmp_path / "config.yaml"))
    assert not re.search("class|typing|Namespace|argparse|None\\b(?!:)", str(refusal.value))


def test_yes_and_no_are_names_where_a_name_stands_and_a_date_is_text(tmp_path):
    text = "models: {m: x}\ndomains: {d: {path: y}}\npubmedqa: {answers: {yes: ' Y', no: ' N', maybe: ' M'}}"
    (tmp_path / "config.yaml").write_text(text)
    config = parse(EvaluateConfig, ["--config", str(tmp_path / "config.yaml"), "--pubmedqa.answers.no", " not"])
    assert config.pubmedqa.answers == {"yes": " Y", "no": " not", "maybe": " M"}
    (tmp_path / "config.yaml").write_text("prepare: {recent_from: 2024-01-31}\ntrain: {epochs: 1e-3}\ntrain.seed: 3")
    config = read("--config", str(tmp_path / "config.yaml"))
    assert (config.prepare.recent_from, config.train.epochs, config.train.seed) == ("2024-01-31", 1e-3, 3)


def test_a_part_of_a_group_keeps_the_defaults_of_the_command(tmp_path):
    (tmp_path / "config.yaml").write_text("train: {steps: 3}")
    argv = ["--init_from", "x", "--data.files", "q", "--config", str(tmp_path / "config.yaml"), "--train", "{seed: 1}"]
    train = parse(FinetuneConfig, argv).train
    assert (train.steps, train.seed, train.epochs, train.patience) == (3, 1, 10, 5)


def test_a_later_file_and_an_option_mend_a_group_that_an_earlier_file_broke(tmp_path):
    (tmp_path / "b.yaml").write_text("model: {d_model: 128}")
    files = [word for name in "ab" for word in ("--config", str(tmp_path / f"{name}.yaml"))]
    (tmp_path / "a.yaml").write_text("model: 5")
    assert read(*files).model.d_model == 128
    (tmp_path / "a.yaml").write_text("domains: {d: 5}\nmodels: {m: x}")
    assert parse(EvaluateConfig, [*files[:2], "--domains.d", "{path: y}"]).domains["d"].path == "y"
    with pytest.raises(UserError, match=r"d = 5: must be a mapping, of which --domains\.d\.path is an entry"):
        parse(EvaluateConfig, [*files[:2], "--domains.d.path", "y"])


def test_mappings_of_text_take_json_and_entries_by_name():
    options = read(
        "--train.compiler_options", '{"a": true}', "--train.compiler_options.b", "3e-1"
    ).train.compiler_options
    assert options == {"a": True, "b": 0.3}


def test_a_file_that_is_not_utf_8_is_named(tmp_path):
    (tmp_path / "latin.yaml").write_bytes("run_dir: caf\xe9".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.yaml: not UTF-8"):
        parse(PretrainConfig, ["--config", str(tmp_path / "latin.yaml")])


def test_yaml_cannot_build_objects(tmp_path):
    (tmp_path / "config.yaml").write_text("run_dir: !!python/object/apply:os.system ['touch owned']\n")
    with pytest.raises(UserError):
        read("--config", str(tmp_path / "config.yaml"))
    assert not Path("owned").exists()


def shown(capsys, *argv):
    """What a command line prints before it ends the process."""
    with pytest.raises(SystemExit) as end:
        read(*argv)
    assert not end.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("schema", COMMANDS)
def test_the_short_help_shows_keys_that_exist_and_names_the_long_one(schema, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        parse(schema, ["--help"], "Do it.\n\npython -m biomamba_jax.it --config FILE\n\nTo the end.\n")
    text = capsys.readouterr().out
    assert text.startswith("usage: python -m biomamba_jax.it ") and "Do it." in text and "To the end." in text
    assert re.findall(r"^  --([\w.]+)", text, re.MULTILINE)[1:] == schema.basic.split()
    assert len(text.splitlines()) < 60 and text.endswith("--help-all lists all settings.\n")


def test_help_says_what_a_setting_takes_and_its_default(capsys):
    text = " ".join(shown(capsys, "--help").split())
    assert (
        "--data.batch_size Rows of one optimizer step, over all devices and hosts. (an integer, at least 1, below 2^31;"
        in text
    )
    assert (
        "(an integer, at least 1, below 2^31; default: 8)" in text
        and "('mamba1' or 'mamba2' or 'mamba3'; default: \"mamba2\")" in text
    )


def test_the_long_help_describes_every_key(capsys):
    text = "".join(shown(capsys, "--help-all").split())

    def described(schema, prefix=""):
        for field in dataclasses.fields(schema):
            if dataclasses.is_dataclass(field.type):
                described(field.type, f"{prefix}{field.name}.")
            else:
                assert f"--{prefix}{field.name}" in text

    described(PretrainConfig)
    assert "Learningrateofeachlayerrelativetothelayeraboveit" in text


def test_a_users_error_is_one_line_and_status_1(capsys):
    def command(argv):
        raise UserError("shards/manifest.json: no such file;\n give another folder")

    with pytest.raises(SystemExit) as stop:
        run_command(command)
    assert stop.value.code == 1
    assert capsys.readouterr().err == "error: shards/manifest.json: no such file; give another folder\n"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "error: memory ran out (); give a smaller batch_size or shorter rows"),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory.\nAt:"),
            "error: memory ran out (RESOURCE_",
        ),
        (RuntimeError("Unable to initialize backend 'cuda': none"), "error: Unable to initialize backend 'cuda': none"),
    ],
)
def test_what_a_machine_lacks_is_one_line(error, said, capsys):
    def command(argv):
        raise error

    with pytest.raises(SystemExit) as stop:
        run_command(command)
    assert stop.value.code == 1
    printed = capsys.readouterr().err
    assert printed.startswith(said) and printed.count("\n") == 1
