"""`python -m biomamba_jax.generate` as its users call it."""

import io
import json
import sys

import pytest
from tiny_models import train_tokenizer, write_tiny_model

import biomamba_jax
from biomamba_jax import generate as command
from biomamba_jax.command_line import run_command

SHORT = ["--max-new-tokens", "16"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    return str(write_tiny_model(path / "native", "mamba2", train_tokenizer(path)))


@pytest.fixture(scope="module")
def expected(folder):
    """Texts of the model without the command."""
    model = biomamba_jax.load(folder)
    return lambda *prompts, **settings: model.generate(prompts, max_new_tokens=16, **settings)


def call(*words, stdin=None, monkeypatch=None):
    if stdin is not None:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    run_command(command.main, list(words))


def test_prompts_are_printed_with_their_continuation(folder, expected, capsys):
    call("--model", folder, "--prompt", "insulin", "--prompt=mice, [1]", *SHORT)
    first, second = expected("insulin", "mice, [1]")
    assert capsys.readouterr().out == f"insulin{first}\n---\nmice, [1]{second}\n"


def test_a_file_holds_one_prompt_a_line(folder, expected, capsys, tmp_path):
    (tmp_path / "prompts.txt").write_text("insulin\n\nmice\n")
    call("--model", folder, "--file", str(tmp_path / "prompts.txt"), *SHORT)
    first, second = expected("insulin", "mice")
    assert capsys.readouterr().out == f"insulin{first}\n---\nmice{second}\n"


def test_json_lines_in_and_out(folder, expected, capsys, monkeypatch):
    prompts = ["insulin", "serum\nglucose", "mice"]
    lines = "\n".join(json.dumps({"prompt": prompt, "id": 1}) for prompt in prompts)
    call("--model", folder, "--jsonl", "--batch_size", "2", *SHORT, stdin=lines, monkeypatch=monkeypatch)
    out = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in out] == prompts
    assert [line["text"] for line in out] == [result.text for result in expected(*prompts)]
    assert set(out[0]) == {"prompt", "text", "tokens", "finish_reason"}
    assert out[0]["finish_reason"] in ("eos", "length")


def test_a_single_prompt_grows_on_a_terminal(folder, expected):
    class Terminal(io.StringIO):
        pieces = 0

        def isatty(self):
            return True

        def write(self, text):
            self.pieces += 1
            return super().write(text)

    screen = Terminal()
    settings = {"temperature": 1.0, "top_k": 20, "seed": 5}
    command.generate(
        command.GenerateConfig(model=folder, prompt=["insulin"], max_new_tokens=16, **settings), sys.stdin, screen
    )
    assert screen.getvalue() == f"insulin{expected('insulin', **settings)[0]}\n"
    assert screen.pieces > 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--model is missing"),
        (["--model", "DIR"], "one of --prompt, --file and --jsonl"),
        (["--model", "DIR", "--prompt", "a", "--jsonl"], "one of --prompt, --file and --jsonl"),
        (["--model", "nowhere", "--prompt", "a"], "nowhere: no such folder"),
        (["--model", "DIR", "--file", "nowhere.txt"], "nowhere.txt: cannot be read"),
        (["--model", "DIR", "--prompt", "a", "--top_p", "2"], "top_p = 2.0"),
        (["--model", "DIR", "--prompt", "a", "--tempersture", "1"], "did you mean 'temperature'"),
        (["--model", "DIR", "--prompt"], "--prompt: give a text"),
    ],
)
def test_a_mistake_ends_in_one_line(folder, capsys, words, message):
    with pytest.raises(SystemExit) as exit:
        call(*[folder if word == "DIR" else word for word in words])
    error = capsys.readouterr().err
    assert exit.value.code == 1
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("line", ["insulin", '{"text": "insulin"}', "[1]"])
def test_a_line_that_is_no_prompt_is_named(folder, capsys, monkeypatch, line):
    with pytest.raises(SystemExit):
        call("--model", folder, "--jsonl", stdin=f'\n{line}\n{{"prompt": "a"}}', monkeypatch=monkeypatch)
    assert "standard input, line 2" in capsys.readouterr().err
