"""The one exception for mistakes that a user can mend; everything else that escapes a command is a bug of ours."""

import errno
from pathlib import Path

_REFUSALS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file-size limit of this process is reached",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "no permission",
    errno.EPERM: "no permission",
    errno.ENOTDIR: "a part of this path is a file, not a directory",
    errno.EEXIST: "a file is in the place of this folder",
    errno.EISDIR: "this is a directory, not a file",
    errno.ENAMETOOLONG: "this name is too long",
    errno.ELOOP: "this link leads to itself",
}


class UserError(Exception):
    """Bad input, shown as one line without a traceback; the command exits with `exit_code`.

    Args:
        what: what is wrong, in one clause.
        where: the file (and line), key or option concerned.
        received: the offending value.
        allowed: what would have been accepted.
        hint: the next step, as an imperative.
        exit_code: the process's exit status, non-zero.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str | Path | None = None,
        received: object = None,
        allowed: str | None = None,
        hint: str | None = None,
        exit_code: int = 2,
    ) -> None:
        parts = [what if where is None else f"{where}: {what}"]
        if received is not None:
            parts.append(f"got {received!r}")
        if allowed is not None:
            parts.append(f"allowed: {allowed}")
        line = "; ".join(parts)
        if hint is not None:
            line = f"{line}. {hint[0].upper()}{hint[1:]}"
        super().__init__(" ".join(line.split()))
        self.exit_code = exit_code


class LackOfMemoryError(UserError):
    """The memory does not hold even the smallest piece of the work."""


def refusal_of(error: OSError) -> str | None:
    """Why the system refuses a file, in a clause for the user; None for errors that are not the user's to mend."""
    return _REFUSALS.get(error.errno or 0)


def user_error_of(error: Exception) -> UserError | None:
    """An exception as a mistake that a user can mend; None if it is a bug of ours."""
    if isinstance(error, OSError) and (refusal := refusal_of(error)):
        return UserError(refusal, where=error.filename, hint="mend this or name another folder, then run it again")
    return error if isinstance(error, UserError) else None
