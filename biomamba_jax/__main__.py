"""All commands under one name: `biomamba COMMAND ...`, or `python -m biomamba_jax COMMAND ...`.

Completion of commands, keys and values: put the line that `biomamba completion` prints into ~/.bashrc, or into ~/.zshrc
below `autoload -U +X bashcompinit && bashcompinit`.
"""

import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import biomamba_jax
from biomamba_jax.command_line import COMPLETE, run_command
from biomamba_jax.errors import UserError

COMMANDS = tuple("prepare plan pretrain finetune report evaluate generate classify tag embed convert".split())


def dispatch(argv: Sequence[str] | None = None) -> None:
    """Run the command that the first argument names; `argv` None: this process's arguments."""
    words = list(sys.argv[1:] if argv is None else argv)
    first = words[0] if words else "--help"
    if first in ("-h", "--help", "--help-all"):
        lines = [f"  {name:10}{(_module(name).__doc__ or '').splitlines()[0]}" for name in COMMANDS]
        print("usage: biomamba COMMAND [--config FILE.yaml] [--KEY VALUE ...]", "", *lines, sep="\n")
        print("\n`biomamba COMMAND --help` describes a command; `biomamba completion` sets up completion in a shell.")
    elif first == "--version":
        print(biomamba_jax.__version__)
    elif first == "completion":
        print(f"complete -o default -C 'biomamba {COMPLETE}' biomamba")
    elif first == COMPLETE:
        _complete(os.environ.get("COMP_LINE", "")[: int(os.environ.get("COMP_POINT", 0))])
    elif first in COMMANDS:
        _module(first).main(words[1:])
    else:
        close = difflib.get_close_matches(first, COMMANDS, 1)
        remedy = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(COMMANDS)}"
        raise UserError(f"{first!r} is not a command; {remedy}")


def _module(name: str) -> Any:
    return importlib.import_module(f"biomamba_jax.{name}")


def _complete(line: str) -> None:
    """Print what the last word of a line can become, as bash's `complete -C` asks for."""
    words = [*line.split()[1:], *([""] if line[-1:].isspace() else [])]
    if len(words) == 1:
        print("\n".join(name for name in COMMANDS if name.startswith(words[0])))
    elif words and words[0] in COMMANDS:
        _module(words[0]).main([*words[1:], COMPLETE])


def main() -> None:
    """Run this process as the command `biomamba`."""
    run_command(dispatch)


if __name__ == "__main__":
    main()
