"""Where the text comes from: plain files, JSON lines, parquet columns, string literals or sources of installed Python modules.

`pieces(data)` gives the documents one after another without holding the whole corpus; `sources(data)` names the files that
they come from, in the order in which they are read (sorted by path, each once). Every problem is a RunError with a code from
MLM0700 to MLM0709 that names file and line.
"""

from __future__ import annotations

import ast
import codecs
import glob
import importlib.machinery
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from mlmdsl.diagnostics import Diagnostic, RunError
from mlmdsl.runtime.config import Data

PIECE_BYTES = 16 << 20  # a larger text file is tokenised in pieces that end at line ends, so that memory stays bounded
PARQUET_ROWS = 1024  # per batch read

Piece = tuple[str, bool]


def sources(data: Data) -> list[Path]:
    """The files that hold the data. Raises MLM0700 where a pattern matches none, MLM0707 for a module without source."""
    find = {"python": _module_source, "python_source": _package_sources}.get(data.kind, _matches)
    return sorted({path for pattern in data.paths for path in find(pattern)})


def pieces(data: Data) -> Iterator[Piece]:
    """The documents in order: text, and whether the document ends with it (always, unless it is a large text file)."""
    for path in sources(data):
        try:
            yield from READERS[data.kind](path, data.field)
        except OSError as error:
            _fail("MLM0708", f"{path}: {error.strerror or error}")


def _matches(pattern: str) -> list[Path]:
    found = [Path(name) for name in glob.glob(pattern, recursive=True) if not Path(name).is_dir()]
    if not found:
        place = Path(pattern).parent
        missing = next((p for p in (place, *place.parents) if p.is_dir()), place)
        hint = f"the folder {missing} exists, nothing in it matches" if missing == place else f"{place} does not exist"
        _fail("MLM0700", f"no file matches {pattern}", f"{hint}; relative paths start at the spec's folder")
    return found


# ---- text -----------------------------------------------------------------------------------------------------------


def _read_text(path: Path, _field: str | None) -> Iterator[Piece]:
    """The whole file is one document."""
    decoder, rest, offset = codecs.getincrementaldecoder("utf-8")(), "", 0
    with path.open("rb") as file:
        while block := file.read(PIECE_BYTES):
            text = rest + _decoded(path, decoder, block, offset, final=False)
            cut = text.rfind("\n") + 1 or len(text)
            yield text[:cut], False
            rest, offset = text[cut:], offset + len(block)
    yield rest + _decoded(path, decoder, b"", offset, final=True), True


def _decoded(path: Path, decoder: codecs.IncrementalDecoder, block: bytes, offset: int, *, final: bool) -> str:
    """`offset` is where `block` starts in the file; bytes of a character that the last block cut are kept by `decoder`."""
    held = len(decoder.getstate()[0])
    try:
        return decoder.decode(block, final)
    except UnicodeDecodeError as error:
        at = offset - held + error.start
        _not_utf8(path, at, error.object[error.start])


def _not_utf8(path: Path, at: int, byte: int, where: str = "") -> NoReturn:
    _fail(
        "MLM0702",
        f"{path}{where or f': byte {at:,}'}: 0x{byte:02x} is not UTF-8",
        f"convert the file: iconv -f latin1 -t utf-8 {path.name}",
    )


# ---- JSON lines -----------------------------------------------------------------------------------------------------


def _read_jsonl(path: Path, field: str | None) -> Iterator[Piece]:
    """The text in `field` ("text" unless it is named) of each line; empty lines are skipped."""
    for place, record in json_lines(path, field or "text"):
        yield text_of(place, record, field or "text", 'jsonl("...", field = '), True


def json_lines(path: Path, field: str = "source") -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line's place and object."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}:{number}", _json_object(f"{path}:{number}", line, field)


def _json_object(place: str, line: bytes, field: str) -> dict[str, Any]:
    try:
        record: Any = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        _fail("MLM0702", f"{place}: byte {error.start + 1} of the line, 0x{line[error.start]:02x}, is not UTF-8")
    except (ValueError, RecursionError) as error:
        _fail("MLM0703", f"{place}: not valid JSON: {error}", "each line must be one JSON object")
    if not isinstance(record, dict):
        _fail("MLM0703", f"{place}: the line is {_kind(record)}, not an object", f'write {{"{field}": "..."}}')
    return record


def text_of(place: str, record: dict[str, Any], field: str, call: str) -> str:
    """The text in `field`; `call` is how a spec would name another field."""
    if field not in record:
        _fail("MLM0704", f'{place}: no field "{field}"', _instead(list(record), call))
    return _text_of(place, f'field "{field}"', record[field])


def _text_of(place: str, what: str, value: object) -> str:
    """A string that UTF-8 can hold: JSON may spell half a surrogate pair."""
    if not isinstance(value, str):
        _fail("MLM0709", f"{place}: {what} is {_kind(value)}, not text")
    return value.encode("utf-8", errors="replace").decode("utf-8")


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", int: "a number", float: "a number", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a string" if isinstance(value, str) else type(value).__name__)


def _instead(names: list[str], call: str) -> str:
    return f'it has {", ".join(names[:8]) or "none"}: name one, {call}"{names[0]}")' if names else ""


# ---- parquet --------------------------------------------------------------------------------------------------------


def _read_parquet(path: Path, column: str | None) -> Iterator[Piece]:
    """Each row of the text column is one document; null rows are skipped. Read in batches of rows."""
    import pyarrow
    import pyarrow.parquet

    column = column or "text"
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_column(path, file.schema_arrow, column)
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[column]):
                for value in batch.column(0).to_pylist():
                    if value is not None:
                        yield value, True
    except UnicodeDecodeError as error:
        _not_utf8(path, 0, error.object[error.start], f': column "{column}"')
    except pyarrow.ArrowException as error:
        _fail("MLM0708", f"{path} cannot be read as parquet: {error}")


def _check_column(path: Path, schema: Any, column: str) -> None:
    import pyarrow.types as types

    if column not in schema.names:
        _fail("MLM0704", f'{path}: no column "{column}"', _instead(schema.names, 'parquet("...", field = '))
    kind = schema.field(column).type
    value = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(value) or types.is_large_string(value) or str(value) == "string_view"):
        _fail("MLM0709", f'{path}: column "{column}" is {kind}, not text')


# ---- Python modules -------------------------------------------------------------------------------------------------


def _module_source(name: str) -> list[Path]:
    """The source file of an installed module, found without importing it or the packages around it."""
    spec: importlib.machinery.ModuleSpec | None = None
    search: Any = None  # sys.path
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        spec = importlib.machinery.PathFinder.find_spec(".".join(parts[:depth]), search)
        if spec is None:
            _fail("MLM0707", f'no Python module "{name}" is installed', 'for example python("pydoc_data.topics")')
        search = spec.submodule_search_locations
        if search is None and depth < len(parts):
            _fail("MLM0707", f'"{".".join(parts[:depth])}" is no package: it has no module "{parts[depth]}"')
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        _fail("MLM0707", f'module "{name}" has no Python source to read text from')
    return [Path(spec.origin)]


def _package_sources(name: str) -> list[Path]:
    """The source file of a module; of a package every one under its folder."""
    path = _module_source(name)[0]
    return sorted(path.parent.rglob("*.py")) if path.name == "__init__.py" else [path]


def _read_python(path: Path, _field: str | None) -> Iterator[Piece]:
    """Each string literal is one document, in source order; keys of dictionaries and parts of f-strings are left out.

    The module is parsed, never run."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError) as error:
        _fail("MLM0708", f"{path} is not Python that this interpreter can parse: {error}")
    for text in _literals(tree):
        yield text, True


def _literals(root: ast.AST) -> Iterator[str]:
    """Depth first with a stack of one's own: a long `a + b + ...` nests deeper than Python's recursion limit."""
    stack = [root]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.strip():
            yield node.value.encode("utf-8", errors="replace").decode("utf-8")
        elif isinstance(node, ast.Dict):
            keys = [key for key in node.keys if key is not None and not isinstance(key, ast.Constant)]
            stack.extend(reversed([*keys, *node.values]))
        elif not isinstance(node, ast.JoinedStr):
            stack.extend(reversed(list(ast.iter_child_nodes(node))))


READERS = {
    "text": _read_text,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "python": _read_python,
    "python_source": _read_text,
}


def _fail(code: str, message: str, help: str = "") -> NoReturn:
    raise RunError([Diagnostic(code, message, help=help)])
