"""The fingerprint: everything that changes a cached feature, hashed; one cache directory holds exactly one.

`fingerprint.json` at the root of a cache is `{"format_version": 1, "fields": {...}, "digest": "..."}`, where the digest
is the SHA-256 of the fields as canonical JSON (sorted keys, no blanks, UTF-8). The file, and hence the digest, keeps
the names that the fields had in version 0.1.0 (`stages.upgrade`), so that older caches and their runs still fit.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from pydantic import ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr

from stages.cache.files.files import SmallFiles
from stages.cache.stores.commit import FILE_NAME
from stages.errors import UserError
from stages.records import FrozenRecord, parse_record
from stages.upgrade import as_first_stored, upgraded

FORMAT_VERSION = 1
ABSENT = "(absent)"

Scalar = StrictStr | StrictInt | StrictFloat | StrictBool | None


class Fingerprint(FrozenRecord):
    """Named facts that decide a feature's value: networks, weight digests, layer, preprocessing, decoder, storage.

    1, 1.0, True and "1" are four different values, as they are in JSON.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    fields: dict[str, Scalar] = Field(min_length=1)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the fields, under their names in the file, as canonical JSON; 64 hexadecimal digits."""
        return _digest(as_first_stored(self.fields))

    def differences(self, other: "Fingerprint") -> list[tuple[str, Scalar, Scalar]]:
        """Return (field, mine, theirs) for each field that differs; `ABSENT` stands for a field one side lacks."""
        names = [*self.fields, *(name for name in other.fields if name not in self.fields)]
        pairs = [(name, self.fields.get(name, ABSENT), other.fields.get(name, ABSENT)) for name in names]
        return [pair for pair in pairs if _canonical(pair[1]) != _canonical(pair[2])]

    def require_match(self, wanted: "Fingerprint | Mapping[str, Scalar]", where: str | Path) -> None:
        """Stop when this cache's fingerprint does not fit what is wanted.

        Args:
            wanted: a whole fingerprint, compared field by field both ways, or a mapping with the few fields that the
                caller knows: only these are compared.

        Raises:
            UserError: naming the first field that differs, with both values.
        """
        if isinstance(wanted, Fingerprint):
            mine, theirs = self, wanted
        else:
            theirs = Fingerprint(fields=dict(wanted))
            mine = Fingerprint.model_construct(fields={k: v for k, v in self.fields.items() if k in wanted})
        different = mine.differences(theirs)
        if different:
            name, cached, asked = different[0]
            more = f" (and {len(different) - 1} more fields)" if len(different) > 1 else ""
            raise UserError(
                f"this cache was made with another {name}{more}",
                where=where,
                received=cached,
                allowed=repr(asked),
                hint="give another --cache directory, or the preset that this cache was made with",
            )


class _FingerprintFile(FrozenRecord):
    format_version: int
    fields: dict[str, Scalar]
    digest: str


def fingerprint_content(fingerprint: Fingerprint) -> bytes:
    """What stands in `fingerprint.json`."""
    fields = as_first_stored(fingerprint.fields)
    content = {"format_version": FORMAT_VERSION, "fields": fields, "digest": fingerprint.digest}
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def load_fingerprint(files: SmallFiles, *, extract_command: str = "pipeline extract") -> Fingerprint:
    """Read the fingerprint of a cache.

    Args:
        extract_command: the command that fills this cache, quoted to the user when there is none.

    Raises:
        UserError: no cache there, another format version, a broken file, or a digest that its fields do not give.
    """
    path = files.root / FILE_NAME
    text = files.content("", FILE_NAME)
    if text is None:
        raise UserError(
            f"no feature cache here (there is no {FILE_NAME})",
            where=files.root,
            hint=f"run `{extract_command}` first, or give the --cache directory it wrote to",
        )
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UserError(f"not valid JSON ({error})", where=path) from None
    version = content.get("format_version") if isinstance(content, dict) else None
    if version is not None and version != FORMAT_VERSION:
        raise UserError(
            "this cache has another format version",
            where=path,
            received=version,
            allowed=str(FORMAT_VERSION),
            hint="use the version of this program that made it, or extract into another --cache directory",
        )
    record = parse_record(_FingerprintFile, content, str(path))
    stored = parse_record(Fingerprint, {"fields": record.fields}, str(path)).fields
    if (digest := _digest(stored)) != record.digest:
        raise UserError(
            "the digest does not belong to the fields, so the file was changed after it was written",
            where=path,
            received=record.digest,
            allowed=digest,
            hint="put the original file back, or extract into another --cache directory",
        )
    return Fingerprint(fields=upgraded(stored))


def _digest(fields: Mapping[str, Scalar]) -> str:
    return hashlib.sha256(_canonical(fields).encode()).hexdigest()


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
