"""What every frozen network shares: no gradients, always in eval mode, weights taken by name."""

from collections.abc import Callable, Iterator, Mapping
from typing import Self

from torch import Tensor, nn


class FrozenModule(nn.Module):
    """A network without gradients that stays in eval mode, also when a parent calls `train()`.

    Dropout and the DiT's label dropout would otherwise wake up in the middle of training.
    """

    def train(self, mode: bool = True) -> Self:  # noqa: ARG002
        """Stay in eval mode whatever is asked."""
        return super().train(mode=False)

    def freeze(self) -> None:
        """Switch gradients and training behaviour off; to be called at the end of the constructor."""
        self.requires_grad_(requires_grad=False)
        self.train()


def load_named(module: nn.Module, tensors: Mapping[str, Tensor], *, prefix: str = "") -> tuple[str, ...]:
    """Fill `module` from `tensors[prefix + name]`; other tensors are never touched.

    Returns:
        the names under which the tensors were taken from the checkpoint.

    Raises:
        ValueError: tensors are missing or have another shape; every one is named, with both shapes.
    """
    state = module.state_dict()
    missing = [name for name in state if prefix + name not in tensors]
    if missing:
        shown = ", ".join(prefix + name for name in missing[:5])
        raise ValueError(f"checkpoint lacks {len(missing)} tensor(s) of {type(module).__name__}: {shown}")
    loaded = {name: tensors[prefix + name] for name in state}
    wrong = [
        f"{prefix + name}: checkpoint {tuple(loaded[name].shape)}, model {tuple(state[name].shape)}"
        for name in state
        if loaded[name].shape != state[name].shape
    ]
    if wrong:
        raise ValueError(f"checkpoint does not fit {type(module).__name__}: " + "; ".join(wrong[:5]))
    module.load_state_dict(loaded)
    return tuple(prefix + name for name in state)


class TensorView(Mapping[str, Tensor]):
    """Tensors by name, which need not be their checkpoint's, each read when it is asked for."""

    def __init__(self, read: Mapping[str, Callable[[], Tensor]]) -> None:
        self._reads = read

    def __getitem__(self, name: str) -> Tensor:
        return self._reads[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._reads

    def __iter__(self) -> Iterator[str]:
        return iter(self._reads)

    def __len__(self) -> int:
        return len(self._reads)
