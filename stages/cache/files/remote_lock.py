"""The locks of a cache at a URL (`lock`): objects that say who writes, and that this is not long ago.

An object store locks nothing. The holder writes the object again every 30 seconds; whoever finds it older than five
minutes, or finds that its writer was a process of this machine that no longer runs, takes it over. Where the store can
create an object only if there is none (S3, GCS), two that come at once cannot both get it; elsewhere, and when two take
over at once, the one that was written last counts, and the other learns so within its first events and stops. Commits
are whole without any lock. The clocks of the machines are taken to agree within minutes.
"""

import json
import logging
import secrets
import threading
import time

from stages.cache.files.lock import cache_locked_by, lock_name, rivals
from stages.cache.files.remote_files import RemoteFiles
from stages.cache.files.writers import Writer, current_writer
from stages.errors import UserError
from stages.lock import holder_in, holder_now
from stages.shard import Shard

BEAT_S = 30.0
STALE_AFTER_S = 300.0
# After a take-over: long enough for another that took over at the same moment to have written its own.
_SETTLE_S = 1.0
_LOG = logging.getLogger(__name__)


class RemoteLock:
    """The lock of a cache at a URL, held between `acquire` and `release`."""

    def __init__(self, files: RemoteFiles, shard: Shard | None = None) -> None:
        self._files, self._name = files, lock_name(shard)
        self._token = secrets.token_hex(8)
        self._holder: dict[str, object] = {}
        self._stop = threading.Event()
        self._beating: threading.Thread | None = None
        self._lost: str | None = None

    def acquire(self) -> None:
        self._holder = holder_now()
        if not self._files.create_file(self._name, self._content()):
            held = self._files.content("", self._name) or b""
            # Our own: the answer to a first try was lost, and the driver tried again.
            if not (self._is_mine(held) or _is_left_behind(held)):
                raise cache_locked_by(held, self._files.root, self._name)
            self._files.add_file("", self._name, self._content())
            time.sleep(_SETTLE_S)
        held = self._files.content("", self._name) or b""
        if not self._is_mine(held):
            raise cache_locked_by(held, self._files.root, self._name)
        self._stop.clear()
        self._beating = threading.Thread(target=self._beat, name="cache-lock", daemon=True)
        self._beating.start()
        try:
            self._refuse_rivals()
        except UserError:
            self.release()
            raise

    def _refuse_rivals(self) -> None:
        """UserError where one writes; what one left behind is removed, so that it learns of that should it wake up."""
        for name in rivals(self._name, self._files.names("")):
            held = self._files.content("", name)
            if held is None:
                continue
            if not _is_left_behind(held):
                raise cache_locked_by(held, self._files.root, name)
            self._files.remove(name)

    def check(self) -> None:
        if self._lost is not None:
            raise UserError(
                f"{self._lost} has taken over this cache, because this process was not heard of for a while",
                where=self._files.root,
                hint="what is committed stays; wait until the other has ended",
                exit_code=1,
            )

    def release(self) -> None:
        if self._beating is None:
            return
        self._stop.set()
        self._beating.join()
        self._beating = None
        try:
            if self._lost is None and self._is_mine(self._files.content("", self._name) or b""):
                self._files.remove(self._name)
        except UserError as error:
            # The work is done; the next one finds an old lock of a process that has ended.
            _LOG.warning("the lock could not be removed, it counts for %d s more: %s", STALE_AFTER_S, error)

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S):
            try:
                held = self._files.content("", self._name) or b""
                if not self._is_mine(held):
                    self._lost = holder_in(held)
                    return
                self._files.add_file("", self._name, self._content())
            except UserError as error:
                _LOG.warning("the lock could not be renewed, it is tried again: %s", error)

    def _content(self) -> bytes:
        fields = {
            **self._holder,
            "token": self._token,
            "writer": f"{self._token}.{current_writer()}",
            "heard": time.time(),
        }
        return json.dumps(fields).encode()

    def _is_mine(self, content: bytes) -> bool:
        return _read(content).get("token") == self._token


def _is_left_behind(content: bytes) -> bool:
    fields = _read(content)
    writer = Writer.of(str(fields.get("writer")))
    if writer is not None and writer.is_known_dead():
        return True
    heard = fields.get("heard")
    return not isinstance(heard, int | float) or time.time() - heard > STALE_AFTER_S


def _read(content: bytes) -> dict[str, object]:
    try:
        fields = json.loads(content)
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) else {}
