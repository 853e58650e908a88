"""Tokenizer files of an exported model, in the form that `transformers.AutoTokenizer` loads offline."""

import re
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers as hf
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from biomamba_jax.data.special_tokens import TOKENIZER_CONFIG
from biomamba_jax.data.tokenizer import Tokenizer, load_tokenizer
from biomamba_jax.errors import UserError
from biomamba_jax.files import write_json

SENTENCEPIECE, TOKENIZER_JSON = "tokenizer.model", "tokenizer.json"
_SPACE = "▁"  # SentencePiece's symbol for a space
_PROBE = (
    "Serum TNF-α rose 2.5-fold (p<0.001).\nMETHODS: 1,024 patients",
    "  two  spaces, a tab\t and <0x0A>, <unk>, Ångström, naïve, ﬁ, ½, µg",
    "日本語 🧬\r\n\n end ",
    "",
)


def find(folder: Path) -> Path | None:
    """Return the tokenizer file in `folder`: a SentencePiece model before a tokenizer.json."""
    return next((folder / name for name in (SENTENCEPIECE, TOKENIZER_JSON) if (folder / name).exists()), None)


def write_for_transformers(file: Path, folder: Path, token_ids: dict[str, Any]) -> None:
    """Write tokenizer.json and tokenizer_config.json of a fast tokenizer.

    Args:
      file: the model's tokenizer; a tokenizer.json must already be in `folder`. What it states of special tokens wins.
      folder: folder of the model.
      token_ids: ids of special tokens, used next; the default is the EOS token.

    Raises:
      UserError: the SentencePiece model cannot be converted, see `from_sentencepiece`.
    """
    tokenizer = load_tokenizer(file)
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "split_special_tokens": True,  # as here, text that spells a special token is ordinary text
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(1e30),
    }
    if file.suffix == ".model":
        from_sentencepiece(file).save(str(folder / TOKENIZER_JSON))
        settings = tokenizer.config | settings
    else:
        if "tokenizer_class" in tokenizer.config:  # as another project's model states it; its prompts may spell them
            del settings["split_special_tokens"]
        settings |= tokenizer.config
        library = hf.Tokenizer.from_file(str(folder / TOKENIZER_JSON))
        if tokenizer.special.adds_start and library.encode("").ids[:1] != [tokenizer.start_id]:
            # transformers ignores add_bos_token where there is a tokenizer.json.
            library.post_processor = _start_template(tokenizer)
            library.save(str(folder / TOKENIZER_JSON))
    eos = tokenizer.token(tokenizer.eos_id)
    for name in ("bos", "eos", "pad", "unk"):
        known = token_ids.get(f"{name}_token_id")
        settings.setdefault(f"{name}_token", tokenizer.token(known) if isinstance(known, int) else eos)
    write_json(folder / TOKENIZER_CONFIG, settings)


def _start_template(tokenizer: Tokenizer) -> processors.TemplateProcessing:
    start = tokenizer.token(tokenizer.start_id)
    return processors.TemplateProcessing(f"{start}:0 $A:0", special_tokens=[(start, tokenizer.start_id)])


def from_sentencepiece(file: Path) -> hf.Tokenizer:
    """Convert a SentencePiece model of `data.tokenizer.train_sentencepiece` to the tokenizers library.

    Prepends the start token, in our own models `<|endoftext|>`, and recognises special tokens in text. All other ids
    are the same, except where two segmentations of a word have the same score to within SentencePiece's float32 sums
    (unigram models: 5 of 6,000 PubMed abstracts, 1 token in 300,000).

    Raises:
      UserError: the two disagree on test texts, since the model was trained with other settings.
    """
    processor = sentencepiece.SentencePieceProcessor(model_file=str(file))
    pieces = [(processor.id_to_piece(i), processor.get_score(i)) for i in range(processor.vocab_size())]
    proto: Any = sentencepiece_model_pb2
    model, unknown = proto.ModelProto.FromString(processor.serialized_model_proto()), processor.unk_id()
    if model.trainer_spec.model_type == model.trainer_spec.BPE:
        ids = {piece: i for i, (piece, _) in enumerate(pieces)}
        learnt = [piece.piece for piece in model.pieces if piece.type == piece.NORMAL and len(piece.piece) > 1]
        merges = [  # pieces are in the order in which they were learnt
            (piece[:cut], piece[cut:])
            for piece in learnt
            for cut in range(1, len(piece))
            if piece[:cut] in ids and piece[cut:] in ids
        ]
        byte = processor.is_byte(processor.piece_to_id("<0x00>"))
        tokenizer = hf.Tokenizer(
            models.BPE(ids, merges, unk_token=pieces[unknown][0], byte_fallback=byte, fuse_unk=not byte)
        )
    else:
        # The unknown piece's name gets a space, which the normalizer replaces: else text could spell it.
        pieces[unknown] = (pieces[unknown][0] + " ", pieces[unknown][1])
        tokenizer = hf.Tokenizer(models.Unigram(pieces, unk_id=unknown, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    # Pieces have a space only in front: splitting there changes nothing, and is faster. Text that spells the name of a
    # byte, "<0x0A>", or of the EOS token is split so that it is not taken for one.
    eos = processor.id_to_piece(processor.eos_id())
    words = pre_tokenizers.Split(Regex(f"{_SPACE}[^{_SPACE}]*"), "isolated")
    spelled = Regex(f"<0(?=x[0-9A-F]{{2}}>)|{re.escape(eos[0])}(?={re.escape(eos[1:])})")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.Split(spelled, "merged_with_previous")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    stated = load_tokenizer(file)
    special = dict.fromkeys((eos, stated.token(stated.start_id)))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    if stated.special.adds_start:
        tokenizer.post_processor = _start_template(stated)
    for text in _PROBE:
        if tokenizer.encode(text, add_special_tokens=False).ids != processor.encode(text):
            raise UserError(
                f"{file}: cannot be converted to tokenizer.json, unlike SentencePiece models of `prepare "
                "--train_tokenizer`; give --tokenizer with a tokenizer.json of the same ids"
            )
    return tokenizer
