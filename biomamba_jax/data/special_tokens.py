"""Special tokens: which ones begin, end and pad a text, as the files next to a tokenizer state it.

tokenizer_config.json counts first, then special_tokens_map.json, config.json and generation_config.json; only an
end-of-text token that none of them states is found by its name.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from biomamba_jax.errors import UserError
from biomamba_jax.files import read_json

EOS = "<|endoftext|>"
EOS_NAMES = (EOS, "</s>", "<|end_of_text|>", "<eos>")
TOKENIZER_CONFIG, _TOKENS_MAP = "tokenizer_config.json", "special_tokens_map.json"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_NAMES = ("bos", "eos", "pad", "unk")


@dataclass(frozen=True)
class SpecialTokens:
    """Special tokens of a tokenizer, by id; no text is encoded as one of them, except as `unk`."""

    eos: int
    """Ends every stored document."""
    start: int
    """Precedes every document: the token that the files say is added before a text, else `eos`."""
    adds_start: bool = False
    """True if the files say that `start` is added before a text; it then precedes prompts too."""
    bos: int | None = None
    """Stated beginning of a text, None: not stated."""
    pad: int | None = None
    """Stated padding, None: not stated."""
    unk: int | None = None
    """Stated unknown token, None: not stated."""

    @property
    def named(self) -> dict[str, int]:
        """Ids of those of "bos", "eos", "pad" and "unk" that are known."""
        return {name: token for name, token in asdict(self).items() if name in _NAMES and token is not None}

    @property
    def never_text(self) -> set[int]:
        """Ids that no text may be encoded as."""
        return {self.start, *(token for name, token in self.named.items() if name != "unk")}


def token_ids(path: Path, raw: Any, vocab_size: int) -> dict[str, Any]:
    """Return those of TOKEN_IDS that a mapping states; each is an id or a list of ids. -1 stands for none.

    Raises:
      UserError: an entry is neither, or not below `vocab_size`.
    """
    if not isinstance(raw, dict):
        raise UserError(f"{path}: token_ids = {raw!r}: must be a mapping")
    found = {key: raw[key] for key in TOKEN_IDS if raw.get(key) not in (None, [], -1)}
    for key, value in found.items():
        ids = value if isinstance(value, list) else [value]
        if not all(type(each) is int for each in ids):
            raise UserError(f"{path}: {key} = {value!r}: must be a token id")
        if not all(0 <= each < vocab_size for each in ids):
            raise UserError(f"{path}: {key} = {value!r:.100}, but there are only {vocab_size} ids; correct it")
    return found


def read_stated(
    file: Path, vocab_size: int, token_id: Callable[[str], int | None], token: Callable[[int], str]
) -> tuple[dict[str, Any], dict[str, int]]:
    """Read what the files next to a tokenizer state.

    Args:
      file: the tokenizer.
      vocab_size: number of its ids.
      token_id: returns the id of a token by its text, None if there is none.
      token: returns the text of a token.

    Returns:
      tokenizer_config.json with the special tokens that other files state, and the ids of those of "bos", "eos",
      "pad" and "unk" that are stated.

    Raises:
      UserError: a stated id or the stated end-of-text token is not in the vocabulary.
    """
    folder, ids = file.parent, dict[str, int]()
    files = [folder / name for name in (TOKENIZER_CONFIG, _TOKENS_MAP)]
    config, tokens_map = (read_json(path) if path.exists() else {} for path in files)
    for name in _NAMES:
        key = f"{name}_token"
        path = files[config.get(key) is None and tokens_map.get(key) is not None]
        if path.name == _TOKENS_MAP:
            config[key] = tokens_map[key]
        stated = config.get(key)
        text = stated.get("content") if isinstance(stated, dict) else stated
        if not isinstance(text, str | None):
            raise UserError(f"{path}: {key} = {stated!r:.100}: must be text, or null")
        found = None if text is None else token_id(text)
        if found is not None:
            ids[name] = found
        elif stated is not None and name == "eos":
            raise UserError(f"{path}: eos_token {text!r} is not a token of {file.name}")
    if not isinstance(adds := config.get("add_bos_token"), bool | None):
        raise UserError(f"{folder / TOKENIZER_CONFIG}: add_bos_token = {adds!r:.100}: must be true or false")
    for path in (folder / "config.json", folder / "generation_config.json"):
        for key, value in token_ids(path, read_json(path), vocab_size).items() if path.exists() else ():
            name, first = key.removesuffix("_token_id"), value[0] if isinstance(value, list) else value
            if name not in ids:
                ids[name], config[f"{name}_token"] = first, token(first)
    # Strict JSON has no Infinity, which others write as model_max_length; null means the same there.
    return json.loads(json.dumps(config), parse_constant=lambda _: None), ids
