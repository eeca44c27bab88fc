"""Records read from JSON and YAML; whatever is wrong with one becomes a single line that names its place."""

import difflib
import json
import re
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from yaml.composer import ComposerError

from stages.errors import UserError

RecordT = TypeVar("RecordT", bound=BaseModel)
_LONGEST_VALUE = 120
_MERGE = "tag:yaml.org,2002:merge"


class FrozenRecord(BaseModel):
    """Base of what is read from files: unknown keys are errors, nothing changes later."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def nearest_hint(name: str, allowed: Iterable[str]) -> str | None:
    """Return "did you mean 'x'?" for the allowed name nearest to a misspelt one, or None when none is near."""
    close = difflib.get_close_matches(name, list(allowed), n=1)
    return f"did you mean {close[0]!r}?" if close else None


def parse_record(model: type[RecordT], data: object, where: str) -> RecordT:
    """Validate `data` as a `model`.

    Raises:
        UserError: one line with `where`, the key, the value received and, for a misspelt key, the nearest valid one.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise _as_user_error(error, model, where) from None


def read_text(path: Path) -> str:
    """Return a UTF-8 file's text (a byte order mark is dropped); UserError when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError("file not found", where=path) from None
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 text (byte {error.start})", where=path) from None
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", where=path) from None


def read_json(path: Path) -> Any:
    """Return a JSON file's content; UserError with line and column when it is broken or repeats a key."""
    return _decode_json(read_text(path), path, first_line=1)


def read_json_entries(path: Path) -> Iterator[tuple[str, str, Any]]:
    """Yield ("file:line", key, value) for each entry of the one object that a JSON file holds.

    Raises:
        UserError: the file is broken, repeats a key, or holds something else than one object.
    """
    text = read_text(path)
    content = _decode_json(text, path, first_line=1)
    if not isinstance(content, dict):
        raise UserError("must hold one JSON object", where=path, received=type(content).__name__)
    end, line = 0, 1
    for key, value in content.items():
        # Entries keep the file's order, so each key is looked for behind the last; one with escapes is not found.
        at = text.find(json.dumps(key, ensure_ascii=False), end)
        if at >= 0:
            line, end = line + text.count("\n", end, at), at
        yield f"{path}:{line}", key, value


def read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield ("file:line", content) for each non-blank line; UserError naming the line when one is broken."""
    # Only "\n" ends a line: str.splitlines would also cut at U+2028, which JSON strings may contain.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", _decode_json(line, path, first_line=number)


def read_yaml(path: Path) -> Any:
    """Return a YAML file's content (safe loader); UserError with line and column when it is broken or repeats a key."""
    return parse_yaml(read_text(path), str(path))


def parse_yaml(text: str, where: str) -> Any:
    """Return a YAML text's content (safe loader); UserError with line and column when it is broken or repeats a key."""
    try:
        return yaml.load(text, _OneOfEachKey)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{where}:{mark.line + 1}:{mark.column + 1}" if mark else where
        raise UserError(f"broken YAML: {error.problem}", where=place) from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that no calendar has
        raise UserError(f"broken YAML: {error}", where=where) from None


class _OneOfEachKey(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, of which the second would silently win.

    Nodes are looked at as they stand in the text: what `<<` merges into a mapping may be overridden there.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key in [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
            # As it will be looked up: `yes` and `true` are one key, 1 and "1" are two.
            name = key.value if key.tag == _MERGE else self.construct_object(key)
            if name in seen:
                raise ComposerError(None, None, f"the key {key.value!r} stands here again", key.start_mark)
            seen.add(name)
        return node


class _RepeatedKeyError(ValueError):
    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key

    def place(self, text: str, path: Path, first_line: int) -> str:
        """File and line of the repeat; just the file where other objects have the key too, so that it is not clear."""
        again = [found.start() for found in re.finditer(rf"{re.escape(json.dumps(self.key))}\s*:", text)]
        if len(again) > 2 and "\n" in text:
            return str(path)
        return f"{path}:{first_line + text.count(chr(10), 0, again[-1] if again else 0)}"


def _decode_json(text: str, path: Path, first_line: int) -> Any:
    if not text.strip():
        raise UserError("broken JSON: the file is empty", where=path)
    try:
        return json.loads(text, object_pairs_hook=_object_without_repeats)
    except json.JSONDecodeError as error:
        place = f"{path}:{first_line + error.lineno - 1}:{error.colno}"
        raise UserError(f"broken JSON: {error.msg}", where=place) from None
    except _RepeatedKeyError as error:
        raise UserError(
            f"key {error.key!r} appears twice in one object", where=error.place(text, path, first_line)
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"broken JSON: {error}", where=f"{path}:{first_line}") from None


def _object_without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _RepeatedKeyError(key)
            seen.add(key)
    return content


def _as_user_error(error: ValidationError, model: type[BaseModel], where: str) -> UserError:
    # A misspelt key is reported as "unknown" and as "missing"; the first is clearer.
    errors = sorted(error.errors(include_url=False), key=lambda entry: entry["type"] != "extra_forbidden")
    first = errors[0]
    location = first["loc"]
    key = ".".join(str(part) for part in location)
    if first["type"] == "extra_forbidden":
        allowed = _keys_at(model, location[:-1])
        return UserError(
            f"unknown key {key!r}",
            where=where,
            allowed=", ".join(allowed),
            hint=nearest_hint(str(location[-1]), allowed),
        )
    if first["type"] == "missing":
        return UserError(f"missing key {key!r}", where=where)
    if first["type"] == "model_type":
        message = "must be an object of keys and values"
    else:
        message = first["msg"].removeprefix("Value error, ")
    what = f"{key}: {message}" if key else message
    # An error of the record as a whole would print the whole record.
    received = None if isinstance(first["input"], dict) else _shortened(first["input"])
    return UserError(what, where=where, received=received, hint=text_hint(first["type"], first["input"]))


def text_hint(kind: str, value: object) -> str | None:
    """What to do about something that should be text (an error of this kind of pydantic's) and is read as another."""
    if kind != "string_type" or value is None or isinstance(value, list | dict):
        return None
    if isinstance(value, bool):
        return 'write it in quotes, as in "yes": YAML reads a bare yes, no, on or off as true or false'
    return f'write it in quotes: "{value}"'


def _shortened(value: object) -> object:
    text = str(value)
    return value if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def _keys_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Return the keys that the (nested) model at `location` knows, sorted as declared."""
    here: Any = model
    for part in location:
        if isinstance(here, type) and issubclass(here, BaseModel):
            here = _without_none(here.model_fields[str(part)].annotation)
        elif typing.get_origin(here) in (typing.Union, types.UnionType):  # `part` is the tag of one of several models
            here = next(one for one in typing.get_args(here) if part in {f.default for f in one.model_fields.values()})
        else:  # dict[K, V] and tuple[V, ...]: the value type is what the next key is looked up in
            arguments = typing.get_args(here)
            here = arguments[1] if typing.get_origin(here) is dict else arguments[0]
    return list(here.model_fields)


def _without_none(annotation: Any) -> Any:
    """What an annotation is beside None; a choice of several models as it is."""
    if typing.get_origin(annotation) not in (typing.Union, types.UnionType):
        return annotation
    parts = [part for part in typing.get_args(annotation) if part is not type(None)]
    return annotation if len(parts) > 1 and all(hasattr(part, "model_fields") for part in parts) else parts[0]
