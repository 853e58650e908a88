"""A folder of embeddings: parts that are each written whole, so that an interrupted run continues, and an index.

embed.json            settings, and once all parts are there, the number of texts in each
part-00000.parquet    columns id, title (the text's first line, at most 200 characters) and embedding
part-00000.npy        format npy: embeddings [texts D]; ids and titles in part-00000.jsonl
part-00000.jsonl      format jsonl: {"id", "title", "embedding"} a line
index.faiss           a faiss index of the normalized embeddings, in the order of the parts
SHA256SUMS            digests of all these files, written last
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self, get_args

import numpy as np

from biomamba_jax.config.embed import Format, Pooling
from biomamba_jax.errors import UserError
from biomamba_jax.extras import extra
from biomamba_jax.files import read_array, read_json, read_json_lines, replacing, write_json, write_json_lines
from biomamba_jax.folders import DIGESTS, check_digests
from biomamba_jax.tasks.documents import Document

ABOUT, INDEX = "embed.json", "index.faiss"
_TITLE = 200
"""Characters of a title."""
_INDEX_KINDS = {"exact": "Flat", "hnsw": "HNSW32"}


class Part(NamedTuple):
    """Some texts and their embeddings."""

    ids: list[str]
    """Id of each text."""
    titles: list[str]
    """Beginning of the first line of each text."""
    vectors: np.ndarray
    """Embeddings, float32 or float16 [texts D]."""

    @classmethod
    def of(cls, documents: Sequence[Document], vectors: np.ndarray, precision: str) -> Self:
        """Return the part of documents and their embeddings.

        Raises:
          UserError: an embedding is beyond the range of `precision`.
        """
        with np.errstate(over="ignore"):
            stored = vectors.astype(precision)
        if not np.isfinite(stored).all():
            raise UserError(f"precision = {precision!r}: an embedding overflows; give float32, or --normalize")
        titles = [document.text.partition("\n")[0][:_TITLE] for document in documents]
        return cls([document.key for document in documents], titles, stored)


class EmbeddingFolder:
    """Embeddings on disk.

    Args:
      path: the folder.
      format: format of the parts.
    """

    def __init__(self, path: Path, format: Format):
        self.path, self._format = path, format

    @classmethod
    def open(cls, path: Path) -> tuple[Self, dict[str, Any]]:
        """Return a complete folder and the content of its embed.json.

        Raises:
          UserError: it is not such a folder, damaged, or not complete.
        """
        about = _read_about(path)
        if "parts" not in about:
            raise UserError(f"{path}: is not complete; run the same `embed` command again")
        return cls(path, about["settings"]["format"]), about

    def start(self, model: str, settings: dict[str, Any], probe: np.ndarray) -> None:
        """Write embed.json, or compare with it what an interrupted run wrote.

        Args:
          model: the model's folder or name.
          settings: what else decides the embeddings, as JSON values.
          probe: embedding of a fixed text, which identifies the model.

        Raises:
          UserError: the folder holds embeddings of other texts, settings or weights.
        """
        if not (self.path / ABOUT).exists():
            write_json(self.path / ABOUT, {"model": model, "settings": settings, "probe": probe.tolist()})
            return
        before = _read_about(self.path)
        changed = [key for key in settings if before["settings"].get(key) != settings[key]]
        if not changed and not same_vector(before["probe"], probe):
            changed = ["weights of model"]
        if changed:
            raise UserError(
                f"{self.path}: holds embeddings with another {', '.join(changed)}; give another --output or remove it"
            )
        (self.path / DIGESTS).unlink(missing_ok=True)  # of what may be written next

    def finish(self, sizes: Sequence[int], left_out: dict[str, int]) -> None:
        """State in embed.json how many texts each part holds, which completes the folder."""
        about = read_json(self.path / ABOUT)
        write_json(self.path / ABOUT, about | {"texts": sum(sizes), "parts": list(sizes), "left_out": left_out})

    def _part(self, number: int, suffix: str = "") -> Path:
        return self.path / f"part-{number:05d}.{suffix or self._format}"

    def has(self, number: int) -> bool:
        """Return True if a part is there, with its ids."""
        return all(self._part(number, suffix).exists() for suffix in {"npy": ("npy", "jsonl")}.get(self._format, ("",)))

    def write(self, number: int, part: Part) -> None:
        """Write a part, whole or not at all."""
        path = self._part(number)
        if self._format == "parquet":
            pa, parquet = (extra("parquet", each, "pyarrow is needed") for each in ("pyarrow", "pyarrow.parquet"))
            flat = pa.array(part.vectors.ravel())
            rows = pa.FixedSizeListArray.from_arrays(flat, part.vectors.shape[1])
            with replacing(path) as temporary:
                parquet.write_table(pa.table({"id": part.ids, "title": part.titles, "embedding": rows}), temporary)
            return
        lines = [{"id": key, "title": title} for key, title in zip(part.ids, part.titles, strict=True)]
        if self._format == "jsonl":
            lines = [line | {"embedding": v.tolist()} for line, v in zip(lines, part.vectors, strict=True)]
        write_json_lines(self._part(number, "jsonl"), lines)
        if self._format == "npy":  # last: it marks the part as complete
            with replacing(path) as temporary, open(temporary, "wb") as file:
                np.save(file, part.vectors)

    def read(self, number: int) -> Part:
        """Read a part.

        Raises:
          UserError: it is missing or damaged.
        """
        path = self._part(number)
        try:
            if self._format == "parquet":
                table = extra("parquet", "pyarrow.parquet", "pyarrow is needed").read_table(path)
                rows = table["embedding"].combine_chunks()
                vectors = rows.flatten().to_numpy(zero_copy_only=False).reshape(len(rows), -1)
                part = Part(table["id"].to_pylist(), table["title"].to_pylist(), vectors)
            else:
                lines = [line for _, line in read_json_lines(self._part(number, "jsonl"))]
                stored = self._format == "npy"
                vectors = read_array(path) if stored else np.array([x["embedding"] for x in lines], np.float32)
                part = Part([line["id"] for line in lines], [line["title"] for line in lines], vectors)
            if part.vectors.ndim != 2 or not len(part.ids) == len(part.titles) == len(part.vectors):
                raise ValueError("ids and embeddings do not go together")
            return part
        except UserError:
            raise
        except Exception as error:  # of pyarrow or NumPy, or of what a line lacks
            raise UserError(f"{path}: cannot be read ({error!r:.200}); remove it and run `embed` again") from None

    def build_index(self, parts: int, kind: str) -> None:
        """Write an index of the normalized embeddings of all parts."""
        faiss = extra("search", "faiss", "faiss is needed")
        width = len(_read_about(self.path)["probe"])
        index = faiss.index_factory(width, _INDEX_KINDS[kind], faiss.METRIC_INNER_PRODUCT)
        for number in range(parts):
            index.add(normalized(np.asarray(self.read(number).vectors, np.float32)))
        with replacing(self.path / INDEX) as temporary:
            faiss.write_index(index, str(temporary))

    def search(self, vector: np.ndarray, k: int, sizes: Sequence[int]) -> Iterator[tuple[float, str, str]]:
        """Yield cosine similarity, id and title of the texts whose embeddings are nearest to `vector` [D].

        Raises:
          UserError: the folder has no index, or one that faiss does not read.
        """
        faiss, path = extra("search", "faiss", "faiss is needed"), self.path / INDEX
        if not path.exists():
            raise UserError(f"{path}: no such file; run `embed` again with --index exact")
        try:
            index = faiss.read_index(str(path))
        except RuntimeError as error:
            raise UserError(f"{path}: cannot be read ({str(error)[:80]}); remove it and run `embed` again") from None
        if (index.ntotal, index.d) != (sum(sizes), len(vector)):
            raise UserError(f"{path}: is not of these embeddings; remove it and run `embed` again")
        (scores,), (found,) = index.search(normalized(vector[None]), min(k, index.ntotal))
        ends = np.cumsum(sizes)
        for score, position in zip(scores.tolist(), found.tolist(), strict=True):
            if position < 0:  # an approximate index may find fewer
                return
            number = int(np.searchsorted(ends, position, side="right"))
            part = self.read(number)
            row = position - (ends[number] - sizes[number])
            yield score, part.ids[row], part.titles[row]


def _read_about(path: Path) -> dict[str, Any]:
    """Return the content of the embed.json in a folder.

    Raises:
      UserError: it is damaged, or another file whose digest the folder has.
    """
    about = read_json(path / ABOUT)
    settings, probe, parts = about.get("settings"), about.get("probe"), about.get("parts", [])
    if not (
        isinstance(settings, dict)
        and isinstance(about.get("model"), str)
        and all(settings.get(key) in get_args(kind) for key, kind in (("format", Format), ("pooling", Pooling)))
        and isinstance(probe, list)
        and all(type(x) is float for x in probe)
        and isinstance(parts, list)
        and all(type(x) is int and x > 0 for x in parts)
    ):
        raise UserError(f"{path / ABOUT}: was not written by `embed`; remove the folder and embed again")
    try:
        check_digests(path, complete=False)
    except UserError as error:
        raise UserError(f"{error}; remove it, or if it is embed.json the folder, and run `embed` again") from None
    return about


def normalized(vectors: np.ndarray) -> np.ndarray:
    """Return vectors [..., D] divided by their Euclidean norms."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), np.finfo(np.float32).tiny)


def same_vector(first: Any, second: Any) -> bool:
    """Return True if two embeddings of a text are the same but for the rounding of another machine or dtype."""
    first, second = np.asarray(first), np.asarray(second)
    return first.shape == second.shape and np.abs(first - second).max() <= 0.02 * np.abs(first).max()
