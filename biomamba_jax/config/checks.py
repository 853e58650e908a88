"""The one form in which a setting is refused."""

from biomamba_jax.errors import UserError


def check(condition: bool, key: str, value: object, remedy: str) -> None:
    """Raises a UserError that names the key, its value and the remedy, unless `condition` holds."""
    if not condition:
        raise UserError(f"{key} = {value!r}: {remedy}")


def check_at_least(least: int, section: str, settings: object, *keys: str) -> None:
    """`check` of each of these settings that is not None."""
    remedy = f"must be at least {least}" if least else "must be 0 or more"
    for key in keys:
        value = getattr(settings, key)
        check(value is None or value >= least, f"{section}.{key}", value, remedy)


def check_folder(key: str, path: str) -> None:
    """`check` of a folder that is written and read as one: what a URL names must be mounted first."""
    check("://" not in path, key, path, "must be a folder of this machine; mount a bucket (gcsfuse) and give its path")
