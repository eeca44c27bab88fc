"""What captions name in a frame: scene, colours and kinds, as those of the web do; never where or how things move."""

import torch
from torch import Tensor

from stages.data.synthetic.plan import LABELS

# In the order of the labels of `stages.data.synthetic.plan.LABELS`.
_PHRASES: dict[str, tuple[str, ...]] = {
    "scene": ("teal office", "brown hotel", "striped green prison", "violet restaurant"),
    "genre": ("bright warm", "harsh", "pale", "dark"),
    "year": ("grey film", "sepia film", "dark rims", "black bars"),
    "writer": ("cross", "ring", "square", "triangle"),
    "director": ("level stripes", "upright stripes", "rising stripes", "falling stripes"),
    "way_speaking": ("flat mouth", "round mouth", "toothy mouth", "smiling mouth"),
}
ALWAYS_NAMED = ("scene", "genre", "year")
DETAILS = ("writer", "director", "way_speaking")
_PAD = 0
WORDS = tuple(dict.fromkeys(word for phrases in _PHRASES.values() for phrase in phrases for word in phrase.split()))
NUM_WORDS = len(WORDS) + 1
_LONGEST = sum(max(len(phrase.split()) for phrase in phrases) for phrases in _PHRASES.values())


def captions(labels: Tensor, *, names_detail: float, draw: torch.Generator) -> Tensor:
    """Captions of frames with labels [N, 7] -> word ids [N, 13], 0 after the last; equal rows are equal captions.

    Scene, light and look are always named, each detail with probability `names_detail`.
    """
    named = torch.rand(len(labels), len(DETAILS), generator=draw) < names_detail
    ids = torch.full((len(labels), _LONGEST), _PAD)
    tasks = list(LABELS)
    for row, (shown, details) in enumerate(zip(labels.tolist(), named.tolist(), strict=True)):
        mentioned = [*ALWAYS_NAMED, *(task for task, wanted in zip(DETAILS, details, strict=True) if wanted)]
        words = [word for task in mentioned for word in _PHRASES[task][shown[tasks.index(task)]].split()]
        ids[row, : len(words)] = torch.tensor([WORDS.index(word) + 1 for word in words])
    return ids
