"""Reading of plain and compressed text, JSON, YAML and arrays with errors that name the file, and atomic writing."""

import bz2
import errno
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import yaml
from isal import igzip
from isal.isal_zlib import IsalError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

from biomamba_jax.errors import UserError

if TYPE_CHECKING:
    import numpy as np

_DECOMPRESSORS: dict[str, Callable[[Any], Any]] = {
    ".gz": lambda raw: igzip.IGzipFile(fileobj=raw),  # three times as fast as gzip
    ".bz2": bz2.BZ2File,
    ".zst": lambda raw: zstd.ZstdFile(raw, options={zstd.DecompressionParameter.window_log_max: 31}),  # the format's
}
_MAX_JSON_BYTES, _MAX_JSON_DEPTH, _MAX_YAML_VALUES = 1 << 30, 200, 1_000_000
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
# The library annotates its exception class as an instance.
_DAMAGED = (EOFError, cast(type[Exception], IsalError), igzip.BadGzipFile, zstd.ZstdError)


@contextmanager
def naming_errors(path: str | Path) -> Iterator[None]:
    """Convert the errors of reading a file into a UserError that names it."""
    try:
        yield
    except _DAMAGED as error:
        kind = {".bz2": "bzip2", ".zst": "zstd"}.get(Path(path).suffix, "gzip")
        raise UserError(f"{path}: truncated or damaged {kind} ({error}); download it again") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} near byte {error.start}); convert it") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the path") from None


def uncompressed_name(path: str | Path) -> str:
    """Return the file's name without .gz, .bz2 or .zst."""
    path = Path(path)
    return path.stem if path.suffix in _DECOMPRESSORS else path.name


def _uncompressed(path: str | Path, raw: BinaryIO) -> BinaryIO:
    decompressor = _DECOMPRESSORS.get(Path(path).suffix)
    if decompressor is None:
        return raw
    if os.fstat(raw.fileno()).st_size == 0:  # which gzip's reader accepts
        raise EOFError("it is empty")
    return decompressor(raw)


def read_chunks(path: str | Path, size: int) -> Iterator[bytes]:
    """Yield the file's bytes, uncompressed, to the end, which verifies the format's checksum."""
    with naming_errors(path), open(path, "rb") as raw:
        file = _uncompressed(path, raw)
        while chunk := file.read(size):
            yield chunk


def read_lines(path: str | Path) -> Iterator[str]:
    """Yield the lines of a UTF-8 text file, uncompressed, without their line ends."""
    with (
        naming_errors(path),
        open(path, "rb") as raw,
        io.TextIOWrapper(_uncompressed(path, raw), encoding="utf-8-sig", newline="\n") as file,
    ):
        for line in file:
            yield line.rstrip("\r\n")


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON file that holds a mapping.

    Raises:
      UserError: the file cannot be read or is not a JSON mapping.
    """
    raw = read_any_json(path)
    if not isinstance(raw, dict):
        raise UserError(f"{path}: is not a mapping")
    return raw


def read_any_json(path: str | Path) -> Any:
    """Read a JSON file of any type, plain or compressed.

    Raises:
      UserError: the file cannot be read or is not JSON.
    """
    content = bytearray()
    for chunk in read_chunks(path, 1 << 20):
        content += chunk
        if len(content) > _MAX_JSON_BYTES:
            raise UserError(f"{path}: holds more than {_MAX_JSON_BYTES >> 30} GiB of JSON; give JSON lines")
    with naming_errors(path):
        text = content.decode("utf-8-sig")
    return _parse_json(text, str(path))


def _parse_json(text: str, where: str, lone_surrogates: bool = False) -> Any:
    try:
        value = json.loads(text)
        if text.count("{") + text.count("[") > _MAX_JSON_DEPTH and _depth(value) > _MAX_JSON_DEPTH:
            raise RecursionError
        if not lone_surrogates and _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError:
        raise UserError(
            f"{where}: holds half a character, such as \\ud83d without its other half; correct it"
        ) from None
    except (ValueError, RecursionError) as error:
        reason = f"nested more than {_MAX_JSON_DEPTH} deep" if isinstance(error, RecursionError) else error
        raise UserError(f"{where}: cannot be read as JSON ({reason})") from None


def _depth(value: Any) -> int:
    """Return how deeply lists and mappings are nested, without recursion."""
    depth, level = 0, [value]
    while level := [each for each in level if isinstance(each, dict | list)]:
        depth += 1
        level = [part for each in level for part in (each.values() if isinstance(each, dict) else each)]
    return depth


class _Yaml(yaml.SafeLoader):
    """YAML in which keys and dates are text, 1e-3 is a number, and a key stands once in a mapping."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - as the library annotates it
        first: [pair for pair in pairs if pair[0] != "tag:yaml.org,2002:timestamp"]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping; its keys are text, also those that YAML would read as a number or as true."""
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                key.tag = "tag:yaml.org,2002:str"
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(problem=f"{key.value!r} twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_yaml(text: str, where: str, loader: type[yaml.BaseLoader | yaml.SafeLoader] = _Yaml) -> Any:
    """Return the value of YAML text; a loader other than the default reads scalars otherwise.

    Raises:
      UserError: it is not YAML; names `where`.
    """
    try:
        parser = loader(text)
        node = parser.get_single_node()
        if node is None:
            return None
        _expanded_size(node, {})
        return parser.construct_document(node)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{where}{line}: cannot be read as YAML ({getattr(error, 'problem', None) or error})") from None


def _expanded_size(node: yaml.Node, sizes: dict[yaml.Node, int]) -> int:
    """Return the number of values of a YAML node with its aliases written out, of which each may repeat the others.

    Raises:
      ValueError: they are too many, or an alias contains itself.
    """
    if node not in sizes:
        sizes[node] = 0  # in progress
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        flat = [part for pair in parts for part in pair] if isinstance(node, yaml.MappingNode) else parts
        sizes[node] = 1 + sum(_expanded_size(part, sizes) for part in flat)
    if not 0 < sizes[node] < _MAX_YAML_VALUES:
        raise ValueError(f"its aliases stand for more than {_MAX_YAML_VALUES:,} values")
    return sizes[node]


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping.

    Raises:
      UserError: the file cannot be read or is not a YAML mapping.
    """
    with naming_errors(path):
        text = Path(path).read_text("utf-8")
    value = parse_yaml(text, str(path))
    if not isinstance(value, dict):
        raise UserError(f"{path}: is not a mapping of settings")
    return value


def read_json_lines(
    path: str | Path, lines: Iterable[str] | None = None, *, lone_surrogates: bool = False
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, mapping) for each line of a JSON lines file, plain or compressed; skips blank lines.

    Args:
      path: the file.
      lines: its lines where it is not a file, such as standard input; `path` then only names it in messages.
      lone_surrogates: accept text with half a character (an unpaired surrogate), which cannot be written as UTF-8.

    Raises:
      UserError: the file cannot be read, or a line is not a JSON mapping; names file and line.
    """
    for number, record in read_any_json_lines(path, lines, lone_surrogates=lone_surrogates):
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number}: is not a mapping")
        yield number, record


def read_any_json_lines(
    path: str | Path, lines: Iterable[str] | None = None, *, lone_surrogates: bool = False
) -> Iterator[tuple[int, Any]]:
    """Yield (line number, value) for each line of a JSON lines file; arguments as those of `read_json_lines`.

    Raises:
      UserError: the file cannot be read, or a line is not JSON; names file and line.
    """
    with naming_errors(path):  # those of `lines`
        for number, line in enumerate(read_lines(path) if lines is None else lines, 1):
            if line.strip():
                yield number, _parse_json(line, f"{path}, line {number}", lone_surrogates)


@contextmanager
def naming_write_errors(path: str | Path, remedy: str) -> Iterator[None]:
    """Convert the errors of writing a file or folder into a UserError that names it and the remedy."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); {remedy}") from None


def read_array(path: str | Path) -> "np.ndarray":
    """Memory-map an array of a .npy file.

    Raises:
      UserError: the file cannot be read or is damaged.
    """
    import numpy as np

    try:
        return np.load(path, mmap_mode="r")
    except Exception as error:  # a damaged header raises many kinds
        raise UserError(f"{path}: cannot be read ({error}); make it again") from None


def read_step_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield each line of a run's metrics with its record, except for a last line that is still being written.

    Raises:
      UserError: a line is not a record with a step; names the file and the line.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return  # truncated by SIGKILL, or being written right now
            try:
                record = json.loads(line)
                if not isinstance(record, dict) or type(record.get("step")) is not int:
                    raise ValueError
            except ValueError:
                raise UserError(
                    f"{path}, line {number}: not a record with a step; repair the line or delete it"
                ) from None
            yield line, record


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`, moved to `path` when the block ends and removed when it raises.

    The file is flushed to disk before it is moved: after a kill or a power cut there is the old file or the new one.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def link_or_move(source: str | Path, place: str | Path) -> None:
    """Give a file a second name by a hard link; move it there where the file system has no links."""
    try:
        os.link(source, place)
    except OSError:
        os.replace(source, place)


def write_text(path: str | Path, content: str) -> None:
    """Write a UTF-8 text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(content, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as strict, indented JSON, atomically.

    Raises:
      ValueError: the value contains NaN or an infinity, which JSON lacks.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_json_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write strict JSON lines atomically; creates the folder.

    Raises:
      ValueError: a record contains NaN or an infinity, which JSON lacks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
    write_text(path, "".join(lines))


@contextmanager
def naming_full_disks(folder: str | Path, remedy: str) -> Iterator[None]:
    """Convert the errors of a full disk, also those of libraries that write there, into a UserError.

    Args:
      folder: what is named if the error names no file.
      remedy: what to do.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        full = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]
        if reason := next((each for each in full if each in str(error)), None):
            name = getattr(error, "filename", None) or folder
            raise UserError(f"{name}: cannot be written ({reason}); {remedy}") from None
        raise
