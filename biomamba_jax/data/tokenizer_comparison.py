"""`prepare tokenizers`: what different tokenizers make of the same text."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from biomamba_jax.config.prepare import FilterConfig, TokenizersConfig
from biomamba_jax.data.filters import judge
from biomamba_jax.data.readers import read_records
from biomamba_jax.data.records import KEPT
from biomamba_jax.data.shards import Manifest
from biomamba_jax.data.tokenizer import Tokenizer, load_tokenizer
from biomamba_jax.errors import UserError
from biomamba_jax.files import read_lines

TERMS = (
    "abscess adenocarcinoma adrenaline albumin aldosterone allele amyloid anemia aneurysm angiogenesis angiotensin "
    "antibody antigen apoptosis arrhythmia arthritis aspirin asthma astrocyte atherosclerosis autophagy bacteremia "
    "biopsy bradycardia bronchitis calcium carcinoma cardiomyopathy catecholamine cerebellum chemokine chemotherapy "
    "cholesterol chromatin cirrhosis collagen corticosteroid creatinine cytokine dementia diabetes dialysis dopamine "
    "dyspnea edema electrophoresis embolism encephalitis endothelium enzyme epilepsy epithelium erythrocyte estrogen "
    "fibroblast fibrosis gastritis genome glucose glutamate glycogen hemoglobin hemorrhage heparin hepatitis "
    "hepatocyte histone hypertension hypoxia immunoglobulin infarction inflammation insulin interferon interleukin "
    "ischemia keratinocyte kinase leukemia ligand lymphoma macrophage melanoma metabolism metastasis metformin "
    "microglia mitochondria mutation myocardial necrosis neuron neutrophil obesity oncogene osteoporosis pancreatitis "
    "pathogenesis peptide phagocytosis phosphorylation plasmid pneumonia prognosis"
).split()


class Comparison(NamedTuple):
    """One tokenizer's figures; single_terms is the share of terms that are one token behind a space."""

    name: str
    vocab_size: int
    tokens: int
    bytes_per_token: float
    tokens_per_word: float
    single_terms: float
    tokens_per_term: float


def compare_tokenizers(config: TokenizersConfig, tokenizers: Sequence[str]) -> list[Comparison]:
    """Encodes the same text with each tokenizer.

    Args:
      tokenizers: files, or folders of shards whose tokenizer is meant.

    Raises:
      UserError: there is no text, no tokenizer, or one that cannot be read.
    """
    if not tokenizers or not config.input:
        raise UserError("name --tokenizers FILES... and the text to measure on with --input FILES...")
    texts = list(_texts(config))
    if not texts:
        raise UserError("--input holds no text; give other files")
    terms = [line.strip() for line in read_lines(config.terms)] if config.terms else list(TERMS)
    terms = [term for term in terms if term]
    if not terms:
        raise UserError(f"{config.terms}: holds no term; give one a line")
    return [_compare(_load(path), texts, terms) for path in tokenizers]


def _compare(tokenizer: Tokenizer, texts: Sequence[str], terms: Sequence[str]) -> Comparison:
    tokens = sum(map(len, tokenizer.encode_batch(texts)))
    words = sum(len(text.split()) for text in texts)
    # Behind a space, as in running text.
    of_terms = [len(ids) for ids in tokenizer.encode_batch([f" {term}" for term in terms])]
    return Comparison(
        tokenizer.name,
        tokenizer.vocab_size,
        tokens,
        bytes_per_token=sum(len(text.encode()) for text in texts) / tokens,
        tokens_per_word=tokens / max(words, 1),
        single_terms=sum(count == 1 for count in of_terms) / len(terms),
        tokens_per_term=sum(of_terms) / len(terms),
    )


def _load(path: str) -> Tokenizer:
    if Path(path).is_dir():
        return load_tokenizer(Path(path) / Manifest.load(path).tokenizer.file)
    return load_tokenizer(path)


def _texts(config: TokenizersConfig) -> Iterator[str]:
    """Documents of each input from its beginning, up to its part of `max_bytes`."""
    for path in config.input:
        left = config.max_bytes // len(config.input)
        for record in judge(read_records(path), FilterConfig()):
            if left <= 0:
                break
            if record.status == KEPT:
                left -= len(record.text.encode())
                yield record.text


def show(found: Sequence[Comparison]) -> None:
    """Prints the comparison as a table."""
    table = Table("tokenizer", "ids", "tokens", "bytes a token", "tokens a word", "terms of one token", "tokens a term")
    for each in found:
        figures = f"{each.bytes_per_token:.3f}", f"{each.tokens_per_word:.3f}", f"{100 * each.single_terms:.1f} %"
        table.add_row(each.name, f"{each.vocab_size:,}", f"{each.tokens:,}", *figures, f"{each.tokens_per_term:.2f}")
    for column in table.columns[1:]:
        column.justify = "right"
    Console().print(table)
