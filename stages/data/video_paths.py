"""Where a video is: below the videos root (a folder or a URL), or at a manifest's own URL of an allowed protocol.

Relative paths cannot leave the root. Links below a local root are followed: whoever made them owns the folder.
"""

import os
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from urllib.parse import quote, unquote

from stages.errors import UserError
from stages.urls import LOCAL, is_url, refuse_secrets, without_secrets

# Other processes see nothing of what is stored there.
_WITHIN_A_PROCESS = ("memory",)


def videos_root(named: str | Path) -> Path | str:
    """Return the folder, or the URL without a trailing slash, that `--videos` names.

    Raises:
        UserError: a URL that carries a secret, wraps another one, or that other processes could not read.
    """
    if isinstance(named, Path) or not is_url(named):
        return Path(named)
    protocol, rest = _parts(named, "--videos")
    if protocol in LOCAL:
        return Path(rest)
    refuse_secrets(named, where="--videos")
    return f"{protocol}://{rest.rstrip('/')}"


def join_video_path(root: Path | str, path: str, protocols: Collection[str], *, video: str) -> str:
    """Return the absolute local path, or the URL, of a manifest's `path` below `root`.

    Args:
        root: as `videos_root` returned it.
        path: relative to the root, absolute, or a URL.
        protocols: those of URLs that may be outside the root; "file" stands for any local file.

    Raises:
        UserError: the path leaves the root, or its protocol is not allowed.
    """
    where = f"path of video {video!r}"
    if not is_url(path):
        if not path.startswith("/"):
            return _below(root, path, where)
        return _local_file(root, path, protocols, where)
    protocol, rest = _parts(path, where)
    if protocol in LOCAL:
        return _local_file(root, unquote(rest), protocols, where)
    if isinstance(root, str) and path.startswith(f"{root}/") and not _goes_up(unquote(path)):
        return path
    if protocol not in protocols:
        raise UserError(
            "no such address may be fetched",
            where=where,
            received=without_secrets(path),
            allowed=f"paths below the videos folder, and addresses of {', '.join(sorted(protocols)) or 'no protocol'}",
            hint="extract.protocols names the protocols",
        )
    return path


def _below(root: Path | str, path: str, where: str) -> str:
    if _goes_up(path):
        raise UserError("a relative path must stay below the videos folder", where=where, received=path)
    if isinstance(root, Path):
        return str(root.absolute() / path)
    # A name may hold what means something in an address.
    return f"{root}/{quote(path) if root.startswith('http') else path}"


def _local_file(root: Path | str, path: str, protocols: Collection[str], where: str) -> str:
    file = Path(os.path.normpath(path))
    below = isinstance(root, Path) and file.is_relative_to(os.path.normpath(root.absolute()))
    if below or not set(LOCAL).isdisjoint(protocols):
        return str(file)
    raise UserError(
        "this file is outside the videos folder",
        where=where,
        received=path,
        allowed=f"files below {root}",
        hint="give the folder that holds all of them as --videos, or add file to extract.protocols",
    )


def _goes_up(path: str) -> bool:
    return ".." in PurePosixPath(path).parts


def _parts(url: str, where: str) -> tuple[str, str]:
    protocol, _, rest = url.partition("://")
    if "::" in url or not rest.strip("/"):
        raise UserError(
            "no address of a video", where=where, received=without_secrets(url), allowed="protocol://place/name"
        )
    protocol = protocol.lower()
    if protocol in _WITHIN_A_PROCESS:
        raise UserError(f"{protocol}:// holds nothing that another process could read", where=where, received=url)
    return protocol, rest
