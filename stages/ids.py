"""Which strings may name a data set, a video, a task or a run: those that are safe as a file name."""

import re

from stages.errors import UserError

_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")


def check_id(value: object, *, kind: str, where: str | None = None, hint: str | None = None) -> str:
    """Return `value` when it is a safe identifier: ASCII letters, digits, `.`, `_`, `-`; 1 to 200; no leading dot.

    Identifiers become folder names in the cache, so a slash, `..` or a control character must never get through.

    Args:
        kind: what it names, for the message ("video id").

    Raises:
        UserError: `value` is no such string.
    """
    if isinstance(value, str) and _ID.fullmatch(value):
        return value
    raise UserError(
        f"{kind} cannot be used as a name",
        where=where,
        received=value if not isinstance(value, str) else value[:210],
        allowed="1 to 200 of A-Z a-z 0-9 . _ -, not starting with a dot",
        hint=hint,
    )
