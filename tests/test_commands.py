"""All commands under one name: what is imported before arguments are parsed, completion, and how a word is refused."""

import os
import subprocess
import sys

import pytest

from biomamba_jax import processor
from biomamba_jax.__main__ import COMMANDS, dispatch
from biomamba_jax.errors import UserError

HEAVY = "jax jaxlib torch flax transformers orbax grain tensorboardX tensorflow numpy scipy matplotlib pyarrow".split()
LIGHTLY = f"""
import contextlib, io, sys
from biomamba_jax.__main__ import COMMANDS, dispatch
from biomamba_jax.command_line import run_command
for argv in [[], *([name, each] for name in COMMANDS for each in ("--help", "--help-all", "--no_such_key"))]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        with contextlib.suppress(SystemExit):
            run_command(dispatch, argv)
loaded = {{name.partition(".")[0] for name in sys.modules}}
print(sorted(loaded & set({HEAVY})))
"""


def test_nothing_heavy_is_imported_before_arguments_are_parsed():
    found = subprocess.run([sys.executable, "-c", LIGHTLY], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


def test_the_name_alone_lists_the_commands(capsys):
    dispatch([])
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in COMMANDS)


def test_a_mistyped_command_is_told_the_nearest():
    with pytest.raises(UserError, match="'pretrian' is not a command; did you mean pretrain"):
        dispatch(["pretrian", "--config", "x.yaml"])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("biomamba pre", ["prepare", "pretrain"]),
        (
            "biomamba pretrain --model.d_",
            ["--model.d_model", "--model.d_state", "--model.d_conv", "--model.d_intermediate"],
        ),
        ("biomamba pretrain --train.steps 3 --model.kind ", ["mamba1", "mamba2", "mamba3"]),
        ("biomamba pretrain --tensorboard f", ["false"]),
        ("biomamba evaluate --mod", ["--models."]),
        ("biomamba prepare inspect --sam", ["--samples"]),
        ("biomamba generate --file READ", []),
        ("biomamba nonsense --", []),
    ],
)
def test_commands_keys_and_values_are_completed(line, words, monkeypatch, capsys):
    monkeypatch.setenv("COMP_LINE", line + "the rest, behind the cursor")
    monkeypatch.setenv("COMP_POINT", str(len(line)))
    try:
        dispatch(["--complete", "biomamba", "", ""])
    except SystemExit as end:
        assert not end.code
    assert capsys.readouterr().out.split() == words


def test_the_line_for_a_shell_completes_there():
    script = f"""
biomamba() {{ {sys.executable} -m biomamba_jax "$@"; }}
eval "$(biomamba completion)"
complete -p biomamba
"""
    found = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout == "complete -o default -C 'biomamba --complete' biomamba\n"


COMPILES = """
from biomamba_jax.command_line import run_command
def command(argv):
    import jax
    print(jax.jit(lambda x: jax.numpy.sin(x) + 1)(0.0))
run_command(command)
"""


@pytest.mark.parametrize(
    ("variables", "kept"),
    [({}, True), ({"JAX_ENABLE_COMPILATION_CACHE": "false"}, False), ({"BIOMAMBA_CACHE": "/dev/null/cache"}, False)],
    ids=["by default", "turned off", "not writable"],
)
def test_compiled_programs_are_kept_in_the_cache_folder(variables, kept, tmp_path):
    cache = {"BIOMAMBA_CACHE": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    command = [sys.executable, "-c", COMPILES]
    ran = subprocess.run(command, env=environment | cache | variables, capture_output=True, text=True, check=True)
    assert ran.stdout == "1.0\n"
    assert any(tmp_path.glob(f"programs/{processor.kind()}/jit__lambda*")) == kept


@pytest.mark.parametrize("stream", ["latin-1", "closed"])
def test_text_is_utf_8_in_every_locale_and_standard_output_may_be_closed(stream, tmp_path):
    code = "from biomamba_jax.command_line import run_command; run_command(lambda argv: print('β 漢'))"
    command = f'exec "$0" -c "$1" > {tmp_path / "out"}' if stream == "latin-1" else 'exec "$0" -c "$1" >&-'
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    subprocess.run(["bash", "-c", command, sys.executable, code], env=environment, check=True)
    assert stream == "closed" or (tmp_path / "out").read_text("utf-8") == "β 漢\n"
