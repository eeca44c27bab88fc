"""The vision tower, trained by contrast with captions (`recipes.small_world.captions`), as CLIP's is."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import InstructBlipVisionConfig, InstructBlipVisionModel

from model.pixels import CLIP_PIXELS
from recipes.small_world.captions import NUM_WORDS, captions
from recipes.small_world.frames import Frames
from recipes.small_world.optimise import Trained, optimise
from recipes.small_world.settings import ContrastSettings
from stages.data.synthetic.drawing import SIZE_PX
from stages.data.synthetic.plan import CLASSES

_PATCH_PX = 14
_CLASS_STD, _PIXELS_STD, _PLACE_STD = 0.02, 0.1, 1.0
_FIRST_SCALE, _MOST_SCALE = 10.0, 100.0  # of the similarities, as CLIP's


class _Towers(nn.Module):
    """Both towers and their projections to one space."""

    def __init__(self, settings: ContrastSettings) -> None:
        super().__init__()
        self.vision = InstructBlipVisionModel(
            InstructBlipVisionConfig(
                hidden_size=settings.width,
                intermediate_size=2 * settings.width,
                num_hidden_layers=settings.layers,
                num_attention_heads=settings.heads,
                image_size=SIZE_PX,
                patch_size=_PATCH_PX,
                initializer_range=0.02,  # the class's own default makes every block the identity
            )
        )
        embeddings = self.vision.embeddings
        nn.init.normal_(embeddings.class_embedding, std=_CLASS_STD)
        # Nothing that captions name needs places, so training would not make patches keep theirs: what a patch
        # shows and where it is start out large beside what the blocks add.
        nn.init.normal_(embeddings.patch_embedding.weight, std=_PIXELS_STD)
        nn.init.normal_(embeddings.position_embedding, std=_PLACE_STD)
        width = settings.text_width
        self.words = nn.Embedding(NUM_WORDS, width)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.text = nn.TransformerEncoder(layer, settings.text_layers, enable_nested_tensor=False)
        self.image_projection = nn.Linear(settings.width, width, bias=False)
        self.text_projection = nn.Linear(width, width, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(_FIRST_SCALE).log())

    def similarities(self, images: Tensor, ids: Tensor) -> Tensor:
        """Images [N, S, S, 3] uint8 and word ids [N, W] -> scaled cosines [N, N], a row for each image.

        The mean over all tokens stands for the image, so that patches too learn what captions name.
        """
        tokens = self.vision(CLIP_PIXELS.normalise(images)).last_hidden_state
        seen = F.normalize(self.image_projection(tokens.mean(1)), dim=-1)
        real = ids > 0
        encoded = self.text(self.words(ids), src_key_padding_mask=~real)
        read = (encoded * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        scale = self.log_scale.exp().clamp(max=_MOST_SCALE)
        cosines: Tensor = scale * seen @ F.normalize(self.text_projection(read), dim=-1).T
        return cosines


def train_tower(
    settings: ContrastSettings, frames: Frames, *, seed: int, device: torch.device
) -> tuple[InstructBlipVisionModel, Trained]:
    """Train on frames [N, 112, 112, 3] in batches of groups whose scene, light and look are the same."""
    torch.manual_seed(seed)
    towers = _Towers(settings).to(device)
    draw = torch.Generator().manual_seed(seed)
    groups = _groups(frames)

    def loss_of(_: int) -> Tensor:
        chosen = torch.randperm(len(groups), generator=draw)[: settings.groups].tolist()
        picked = torch.cat([_some(groups[number], settings.group_size, draw) for number in chosen])
        ids = captions(frames.labels[picked], names_detail=settings.names_detail, draw=draw)
        ids = ids.to(device)
        return contrastive_loss(towers.similarities(frames.images[picked].to(device), ids), ids)

    trained = optimise("tower", towers.parameters(), loss_of, steps=settings.steps, lr=settings.lr)
    return towers.vision.eval(), trained


def contrastive_loss(similarities: Tensor, ids: Tensor) -> Tensor:
    """CLIP's symmetric loss [] of similarities [N, N]; equal captions [N, W] are equally right for each other."""
    same = (ids[:, None] == ids[None]).all(-1).float()
    targets = same / same.sum(1, keepdim=True)
    return 0.5 * (F.cross_entropy(similarities, targets) + F.cross_entropy(similarities.T, targets))


def _groups(frames: Frames) -> list[Tensor]:
    """Indices of the frames of each combination of scene, light and look."""
    combined = (frames.label("scene") * CLASSES + frames.label("genre")) * CLASSES + frames.label("year")
    return [torch.nonzero(combined == value).squeeze(1) for value in combined.unique()]


def _some(group: Tensor, count: int, draw: torch.Generator) -> Tensor:
    return group[torch.randint(len(group), (count,), generator=draw)]
