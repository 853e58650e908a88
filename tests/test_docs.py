"""README and docs: every command that they show is parsed by its own program, snippets run, links lead somewhere."""

import dataclasses
import importlib
import json
import re
import shlex
import signal
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_models import train_tokenizer, write_tiny_model

import biomamba_jax.config as schemas
from biomamba_jax.config.convert import ConvertConfig
from biomamba_jax.config.embed import ContrastiveConfig, EmbedConfig, RetrievalConfig, SearchConfig
from biomamba_jax.config.generate import GenerateConfig
from biomamba_jax.config.plan import PlanConfig
from biomamba_jax.config.prepare import DownloadConfig, InspectConfig, TokenizersConfig
from biomamba_jax.errors import UserError

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "launch" / "README.md", *DOCS]
PROGRAM = r"python -m (biomamba_jax\.\w+|benchmarks)\s"
BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```$|((?:^ {4}.*\n|^\n)+)", re.MULTILINE | re.DOTALL)


class Parsed(Exception):
    """Ends a command once its settings have been read."""


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """Yield the language and the text of each code block, fenced or indented."""
    for language, fenced, indented in BLOCK.findall(page.read_text()):
        if fenced or indented.strip():
            yield (language, fenced) if fenced else ("", indented)


def shell_commands() -> list[str]:
    """Return every command of ours in a code block or in a config's comment."""
    found = []
    for config in (ROOT / "configs").rglob("*.yaml"):
        found += re.findall(rf"^#\s+({PROGRAM}.*)$", config.read_text(), re.MULTILINE)
    found = [command for command, _ in found]
    for page in PAGES:
        for language, block in blocks(page):
            if language in ("", "bash"):
                lines = re.sub(r"\\\n\s*", "", block).splitlines()
                found += [line.strip() for line in lines if re.match(r"\s*" + PROGRAM, line)]
    return sorted(set(found))


@pytest.fixture
def parsed(monkeypatch):
    """Return a function that runs a command line until its settings have been parsed, and returns them."""
    before = signal.getsignal(signal.SIGTERM)

    def run(line: str):
        words = shlex.split(line, comments=True)[2:]
        command = importlib.import_module("benchmarks.__main__" if words[0] == "benchmarks" else words[0])
        parse = command.parse

        def stop(*arguments, **options):
            raise Parsed(parse(*arguments, **options))

        monkeypatch.setattr(command, "parse", stop)
        with pytest.raises(Parsed) as end:
            command.main(words[1:])
        return end.value.args[0]

    monkeypatch.chdir(ROOT)  # configs are named from there
    yield run
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("line", shell_commands())
def test_commands_are_parsed_with_their_settings(line, parsed):
    assert dataclasses.is_dataclass(parsed(line))


def test_the_commands_of_every_kind_are_among_those_parsed():
    shown = {match[1] for line in shell_commands() if (match := re.match(PROGRAM, line))}
    names = "prepare plan pretrain report finetune evaluate generate classify tag embed convert".split()
    assert shown >= {"benchmarks", *(f"biomamba_jax.{name}" for name in names)}


def test_a_wrong_option_would_be_found(parsed):
    with pytest.raises(UserError, match="topolgy"):
        parsed("python -m biomamba_jax.plan --config configs/mamba2_130m.yaml --topolgy v5e-256")


def test_the_error_that_is_shown_is_the_one_that_is_printed(parsed):
    shown = re.search(r"^error: (.*optimizer\.learning_rat'.*)$", (ROOT / "docs/commands.md").read_text(), re.MULTILINE)
    with pytest.raises(UserError) as error:
        parsed("python -m biomamba_jax.pretrain --optimizer.learning_rat 3e-4")
    assert str(error.value) == shown[1]


def test_the_readme_fits_on_a_few_screens():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 180


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        if anchor:
            assert anchor in map(slug, re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)), target


def slug(heading: str) -> str:
    """Return the anchor that GitHub and mkdocs give to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_files_settings_options_extras_and_targets_exist(page):
    text = page.read_text()
    for name in re.findall(r"\b(?:configs|launch|tests|biomamba_jax|benchmarks)/[\w./-]*\w", text):
        assert (ROOT / name).exists(), name
    for key in re.findall(r"`([a-z]+(?:\.[a-z0-9_]+)+)[ `]", text):
        if key.split(".")[0] in SECTIONS and key.split(".")[-1] not in ("json", "safetensors"):
            assert key in SETTINGS, key
    for option in re.findall(r"`--([\w.-]+)", text):
        known = SETTINGS | {
            "help",
            "help-all",
            "settings",
            "dry-run",
            "config",
            "target",
            "rows",
            "length",
            "allocator",
        }
        assert option.replace("-", "_") in known or option in known, option
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra in re.findall(r"'\.\[(\w[\w,-]*)\]'", text):
        assert set(extra.split(",")) <= set(project["optional-dependencies"]), extra
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"(?:`|^ +|^)make ([\w-]+)", text, re.MULTILINE):
        assert target in targets, target


def keys(schema: type, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of a schema, groups included."""
    for field in dataclasses.fields(schema):
        yield prefix + field.name
        inner = field.type if isinstance(field.type, type) else getattr(schemas, str(field.type), None)
        if dataclasses.is_dataclass(inner):
            yield from keys(inner, f"{prefix}{field.name}.")


SCHEMAS = [schemas.PretrainConfig, schemas.FinetuneConfig, schemas.EvaluateConfig, schemas.PrepareConfig, PlanConfig]
SCHEMAS += [DownloadConfig, InspectConfig, TokenizersConfig]
SCHEMAS += [ConvertConfig, GenerateConfig]
SCHEMAS += [EmbedConfig, SearchConfig, RetrievalConfig, ContrastiveConfig]
SETTINGS = {key for schema in SCHEMAS for key in keys(schema)}
SECTIONS = {key.split(".")[0] for key in SETTINGS if "." in key}


def test_every_config_is_in_the_docs_and_every_documented_size_is_a_config():
    table = (ROOT / "docs" / "pretraining.md").read_text()
    listed = re.findall(r"`(mamba\d)_(?:\{([\w,]+)\}_)?\{([\w.,]+)\}\.yaml`", table)
    named = {
        "_".join(filter(None, (kind, form, size))) + ".yaml"
        for kind, forms, sizes in listed
        for form in forms.split(",")
        for size in sizes.split(",")
    }
    assert len(named) == 18
    text = "".join(page.read_text() for page in PAGES)
    named |= {name for name in re.findall(r"\w+\.yaml", text) if (ROOT / "configs" / name).exists()}
    assert named == {path.name for path in (ROOT / "configs").glob("*.yaml")}


def test_api_pages_name_what_exists():
    for page in (ROOT / "docs" / "api").glob("*.md"):
        for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE):
            try:
                importlib.import_module(name)
            except ModuleNotFoundError:
                module, _, attribute = name.rpartition(".")
                assert hasattr(importlib.import_module(module), attribute), name


def test_export_generation_and_loading_run_as_shown(tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").mkdir()
    write_tiny_model(tmp_path / "runs" / "quickstart", "mamba2", train_tokenizer(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evaluation").mkdir()
    report = {"models": {"quickstart": {"path": "runs/quickstart"}}, "domains": {}, "tasks": {}}
    (tmp_path / "evaluation" / "report.json").write_text(json.dumps(report))
    page = ROOT / "docs" / "export.md"
    for line in shell_commands():
        if line in page.read_text():
            words = shlex.split(line)[2:]
            importlib.import_module(words[0]).main(words[1:])
    assert "Patients with chronic kidney disease" in capsys.readouterr().out
    snippets = [block for language, block in blocks(page) if language == "python"]
    snippets += [block for language, block in blocks(ROOT / "docs" / "api" / "load.md") if language == "python"]
    for snippet in snippets:
        if "transformers" not in snippet:  # tests/interop has that
            exec(snippet, {})
    assert len(snippets) == 4


def test_snippets_are_python():
    for page in PAGES:
        for language, block in blocks(page):
            if language == "python":
                compile(block, str(page), "exec")
