"""`python -m biomamba_jax.generate` as its users call it."""

import io
import json
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import pytest
from tiny_models import train_tokenizer, write_tiny_model

import biomamba_jax
from biomamba_jax import generate as command
from biomamba_jax.command_line import parse, run_command

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


def test_a_file_s_lines_end_at_line_ends_only_and_its_mark_is_no_text(tmp_path):
    (tmp_path / "prompts.txt").write_bytes("\ufeffa\u2028b\r\nc\x85d\n".encode())
    assert command._read_lines(tmp_path / "prompts.txt") == ["a\u2028b", "c\x85d"]


ARGUMENT = st.characters(exclude_categories=["Cs"], exclude_characters="\0")  # what a process can be given


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    st.lists(st.text(ARGUMENT), min_size=1, max_size=3), st.lists(st.text(ARGUMENT, min_size=1), max_size=2)
)
@hypothesis.example(
    ["\U0001f9ec", "a\x85b\u2028c\x7f", "\"'\n\r\t\\", "\ufeff", " x ", "null", "- a: #b"], ["\U0001f9ec"]
)
def test_every_text_arrives_as_it_was_given(prompts, stops):
    words = ["--model", "m"]
    words += [word for text in prompts for word in ("--prompt", text)] + [f"--stop={text}" for text in stops]
    config = parse(command.GenerateConfig, words, verbatim=command.VERBATIM)
    assert (config.prompt, config.stop) == (prompts, stops)


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
        (["--model", __file__, "--prompt", "a"], "test_generate_command.py: is a file; give the folder of a model"),
        (
            ["--model", "m", "--file", "a.jsonl"],
            "file = 'a.jsonl': is not a prompt a line; give JSON lines as --jsonl",
        ),
        (["--model", "DIR", "--file", "nowhere.txt"], "nowhere.txt: cannot be read"),
        (["--model", "DIR", "--prompt", "a", "--top_p", "2"], "top_p = 2.0"),
        (["--model", "DIR", "--prompt", "a", "--tempersture", "1"], "did you mean '--temperature'"),
        (["--model", "DIR", "--prompt"], "--prompt: give a value"),
        (["--model", "DIR", "--prompt", "a\udcff"], r"--prompt: 'a\udcff' is not valid Unicode"),
        (["--model", "DIR", "--prompt", "a", "--stop", "\ud83e"], r"--stop: '\ud83e' is not valid Unicode"),
        (["--model", "DIR", "--prompt", "a", "--seed", str(2**32)], "seed = 4294967296"),
        (["--model", "DIR", "--prompt", "a", "--seed=-1"], "seed = -1"),
        (["--model", "DIR", "--prompt", "a", "--top_k", str(2**31)], "top_k = 2147483648"),
        (["--model", "DIR", "--prompt", "a", "--temperature", ".inf"], "temperature = inf"),
        (["--model", "DIR", "--prompt", "a", "--temperature", "1e-39"], "temperature = 1e-39"),
        (["--model", "DIR", "--prompt", "a", "--repetition_penalty", ".inf"], "repetition_penalty = inf"),
    ],
)
def test_a_mistake_ends_in_one_line(folder, capsys, words, message):
    with pytest.raises(SystemExit) as exit:
        call(*[folder if word == "DIR" else word for word in words])
    error = capsys.readouterr().err
    assert exit.value.code == 1
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "line",
    ["insulin", '{"text": "insulin"}', "[1]", "[" * 100_000, '{"prompt": "\\ud800"}'],
    ids=lambda line: line[:20],
)
def test_a_line_that_is_no_prompt_is_named(folder, capsys, monkeypatch, line):
    with pytest.raises(SystemExit):
        call("--model", folder, "--jsonl", stdin=f'\n{line}\n{{"prompt": "a"}}', monkeypatch=monkeypatch)
    assert "standard input, line 2" in capsys.readouterr().err


def test_standard_input_that_is_not_utf_8_ends_in_one_line(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"prompt": "\xff"}'), "utf-8"))
    with pytest.raises(SystemExit):
        call("--model", folder, "--jsonl")
    assert "standard input: not UTF-8" in capsys.readouterr().err


def test_a_reader_that_goes_ends_a_command_without_a_word():
    code = (
        "import sys; from biomamba_jax.command_line import run_command\n"
        "run_command(lambda argv: [print('line', flush=True) for _ in range(100_000)])"
    )
    writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert writer.stdout.readline() == b"line\n"
    writer.stdout.close()
    assert (writer.stderr.read(), writer.wait()) == (b"", 141)
    writer.stderr.close()


def test_a_broken_pipe_elsewhere_is_not_hidden():
    def command(argv):
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        run_command(command)
