"""What a commit record knows of the video file whose frames it holds, and whether the file is still that one.

Size and modification time are read without opening the file. A time proves little: copies have new ones. So a
file of another size has changed, and one of the same size and another time may have, unless a digest decides.
"""

import stat
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import AwareDatetime, Field

from stages.files import sha256_of
from stages.records import FrozenRecord
from stages.urls import is_url, open_filesystem
from stages.wording import first_names

Verdict = Literal["same", "changed", "unsure"]

# Archives and some file systems keep times to a second or two.
_SAME_WITHIN_S = 2.0
# What servers call the version of a file, the most specific first; fsspec passes these on under their own names.
_VERSION_KEYS = ("ETag", "etag", "content_md5", "md5Hash", "Last-Modified", "LastModified", "last_modified", "updated")
# On a network file system or a server each look costs a round trip.
_LOOKS_AT_ONCE = 16


class VideoSource(FrozenRecord):
    """A video's file as it was when its frames were taken; what is not known is None.

    Attributes:
        path: as the manifest names it, without the query of an address.
        modified: when it was last written, for a local file.
        version: what the server of an address calls this version of it.
        sha256: of its content, where `extract.digest_videos` asks for it.
        remark: one line on damage of the file that spares the cached frames.
        whole_before_s: frames shown from here on, in seconds, cannot be had from the file, because it is damaged.
    """

    path: str
    num_bytes: int | None = Field(default=None, ge=0)
    modified: AwareDatetime | None = None
    version: str | None = None
    sha256: str | None = None
    remark: str | None = None
    whole_before_s: float | None = Field(default=None, ge=0)

    def compare(self, now: "VideoSource") -> Verdict:
        """Whether `now`, taken from the file of today, is the same file."""
        if self.sha256 is not None and now.sha256 is not None:
            return "same" if self.sha256 == now.sha256 else "changed"
        if None not in (self.num_bytes, now.num_bytes) and self.num_bytes != now.num_bytes:
            return "changed"
        if self.modified is not None and now.modified is not None:
            apart_s = abs((now.modified - self.modified).total_seconds())
            return "same" if apart_s <= _SAME_WITHIN_S else "unsure"
        if self.version is not None and now.version is not None:
            return "same" if self.version == now.version else "unsure"
        return "same"

    def later(self, now: "VideoSource") -> "VideoSource":
        """`now` with what this one knows of damage, for frames that are added from the same file."""
        known = {name: getattr(self, name) for name in ("remark", "whole_before_s") if getattr(now, name) is None}
        return now.model_copy(update=known)


def look_at(
    path: str,
    *,
    named: str | None = None,
    digest: bool = False,
    copy: Path | None = None,
    silent: set[str] | None = None,
) -> VideoSource:
    """Describe the file at a path or URL; of one that is not there, or that a server knows nothing of, only its name.

    Args:
        path: an absolute path, or an address of any protocol that fsspec knows.
        named: how the manifest names it; None: as `path` does.
        digest: whether to read all of a local file, or of the `copy`, for its SHA-256.
        copy: where the content of an address was fetched to.
        silent: servers that are not asked any more; one that gives no answer is added.
    """
    shown = named or path
    # The query of an address may be a signature.
    plain = VideoSource(path=shown.partition("?")[0] if is_url(shown) else shown)
    if not is_url(path):
        return plain.model_copy(update=_of_file(Path(path), digest=digest))
    facts = _of_address(path, set() if silent is None else silent)
    if copy is not None:
        # What was fetched is what was used, whatever the server reports meanwhile.
        facts |= {name: value for name, value in _of_file(copy, digest=digest).items() if name != "modified"}
    return plain.model_copy(update=facts)


def _of_file(path: Path, *, digest: bool) -> dict[str, Any]:
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            return {}
        facts = {"num_bytes": found.st_size, "modified": datetime.fromtimestamp(found.st_mtime, UTC)}
        return facts | ({"sha256": sha256_of(path)} if digest else {})
    except OSError:
        return {}  # whoever decodes it reports why it cannot be read


def _of_address(url: str, silent: set[str]) -> dict[str, Any]:
    server = "/".join(url.split("/")[:3])
    if server in silent:
        return {}
    try:
        files, path = open_filesystem(url)
        found = files.info(path)
    except Exception as error:  # noqa: BLE001  # each protocol's library has exceptions of its own
        cause = error.__cause__ or error  # fsspec's http calls every failure a missing file
        if not isinstance(cause, FileNotFoundError) and getattr(cause, "status", None) is None:
            silent.add(server)  # no answer at all; thousands of others would be waited for in vain, too
        return {}
    version = next((str(found[key]) for key in _VERSION_KEYS if found.get(key)), None)
    return {"num_bytes": found.get("size"), "version": version}


@dataclass(frozen=True)
class Changes:
    """Committed videos whose files are not, or may not be, those of their frames.

    Attributes:
        changed: the file is another one: its size or its digest differs. Id to what differs.
        unsure: the size is the same, but not the modification time, or not the server's version. Likewise.
        absent: nothing is found at the file's place, or its server does not know it.
    """

    changed: dict[str, str] = field(default_factory=dict)
    unsure: dict[str, str] = field(default_factory=dict)
    absent: tuple[str, ...] = ()
    compared: int = 0

    @property
    def outdated(self) -> tuple[str, ...]:
        return (*self.changed, *self.unsure)


def find_changes(
    recorded: Mapping[str, VideoSource],
    place_of: Callable[[str], str],
    *,
    digests: Literal["all", "in doubt", "none"] = "in doubt",
    on_video: Callable[[], None] = lambda: None,
) -> Changes:
    """Compare files with what commit records know of them.

    Args:
        digests: which files whose digest is recorded are read whole to compare it.
    """

    silent: set[str] = set()

    def look(video: str) -> tuple[str, VideoSource, VideoSource, Verdict]:
        before, place = recorded[video], place_of(video)
        now = look_at(place, silent=silent)
        verdict = before.compare(now)
        doubt = digests == "all" or (digests, verdict) == ("in doubt", "unsure")
        if before.sha256 is not None and doubt and not is_url(place):
            now = look_at(place, digest=True)
            verdict = before.compare(now)
        return video, before, now, verdict

    found, absent = Changes(compared=len(recorded)), []
    with ThreadPoolExecutor(_LOOKS_AT_ONCE) as pool:
        for video, before, now, verdict in pool.map(look, recorded):
            if now.num_bytes is None:
                absent.append(video)
            elif verdict == "changed":
                found.changed[video] = _difference(before, now)
            elif verdict == "unsure":
                found.unsure[video] = _difference(before, now)
            on_video()
    return Changes(found.changed, found.unsure, tuple(absent), len(recorded) - len(absent))


def _difference(before: VideoSource, now: VideoSource) -> str:
    if None not in (before.num_bytes, now.num_bytes) and before.num_bytes != now.num_bytes:
        return f"{before.num_bytes:,} bytes, now {now.num_bytes:,}"
    if before.sha256 is not None and now.sha256 is not None:
        return "other content of the same size"
    if before.modified is not None and now.modified is not None:
        return f"modified {before.modified:%Y-%m-%d %H:%M:%S}, now {now.modified:%Y-%m-%d %H:%M:%S}"
    return "another version on the server"


def outdated_sentence(changes: Changes) -> str:
    """How many videos have, or may have, other files than when they were extracted, and the first of them."""
    parts = []
    for what, found in (
        ("have changed since their extraction", changes.changed),
        ("may have changed (same size, another time or version)", changes.unsure),
    ):
        if found:
            named = [f"{video}: {difference}" for video, difference in found.items()]
            parts.append(f"video files that {what}: {len(found)} ({first_names(named, '; ')})")
    return ", ".join(parts)


def damaged_sentence(remarks: Mapping[str, str]) -> str:
    """How many videos are from damaged files, by what is known of the damage, and the first of them."""
    named = [f"{video}: {remark}" for video, remark in remarks.items()]
    return f"damaged video files, used as far as they are whole: {len(named)} ({first_names(named, '; ')})"
