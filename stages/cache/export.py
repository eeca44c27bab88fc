"""What the kinds of export have in common: they are read, and nobody writes into them."""

from collections.abc import Sequence
from typing import ClassVar, NoReturn

from stages.cache.errors import read_only_export
from stages.cache.files import SmallFiles
from stages.cache.places import Place


class Export:
    """The part of `stores.Store` that is the same for every kind."""

    kind: ClassVar[str]
    root: Place

    def contents(self: SmallFiles, folder: str, names: Sequence[str]) -> list[bytes | None]:
        """See `SmallFiles.contents`."""
        return [self.content(folder, name) for name in names]

    def require_writable(self) -> NoReturn:
        """See `Store.require_writable`."""
        raise read_only_export(self.kind, self.root)

    def groups(self) -> None:
        """See `Store.groups`."""
        return
