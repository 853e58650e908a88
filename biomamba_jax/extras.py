"""Modules of the package's extras, which are imported where they are needed."""

import importlib
from typing import Any

from biomamba_jax.errors import UserError


def extra(name: str, module: str, purpose: str) -> Any:
    """Import a module of an extra.

    Args:
      name: the extra.
      module: the module.
      purpose: what needs it, for the message.

    Raises:
      UserError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"{purpose}: pip install 'biomamba-jax[{name}]'") from None
