"""The one form in which a setting is refused."""

from biomamba_jax.errors import UserError


def check(condition: bool, key: str, value: object, remedy: str) -> None:
    """Raises a UserError that names the key, its value and the remedy, unless `condition` holds."""
    if not condition:
        raise UserError(f"{key} = {value!r}: {remedy}")
