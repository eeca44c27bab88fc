"""Without memory the Q-Former is InstructBLIP's own."""

import pytest
import torch
from tiny_qformer import LEVELS, QUERIES, build_qformer, difference_in_levels, random_features, random_text
from tolerances import FLOAT32_HIDDEN


@pytest.fixture(scope="module")
def model():
    model = build_qformer()
    torch.nn.init.zeros_(model.frame_positions.weight)  # a picture has no time
    return model


def levels_of_transformers(model, picture, text):
    """Hidden states of `InstructBlipQFormerModel`, as InstructBLIP calls it, at the query positions."""
    batch = len(picture)
    queries = model.query_tokens.expand(batch, -1, -1)
    out = model.qformer(
        input_ids=text.ids,
        attention_mask=torch.cat([torch.ones(batch, QUERIES), text.mask], dim=1).long(),
        query_embeds=queries,
        encoder_hidden_states=picture,
        encoder_attention_mask=torch.ones(picture.shape[:2]).long(),
        output_hidden_states=True,
    )
    return [hidden[:, None, :QUERIES] for hidden in out.hidden_states]


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(6,), (6, 2), (3, 6, 1)])
def test_one_frame_gives_the_thirteen_hidden_states_of_transformers(model, lengths):
    text = random_text(*lengths)
    features = random_features(len(lengths), 1)
    expected = levels_of_transformers(model, features[:, 0], text)
    assert len(expected) == LEVELS
    assert difference_in_levels(model(features, text).levels, expected) <= FLOAT32_HIDDEN
    empty = model.empty_memory(len(lengths), features.shape[2], text.ids.shape[1])
    assert difference_in_levels(model.step(empty, features[:, 0], text).levels, expected) <= FLOAT32_HIDDEN


@torch.no_grad()
def test_the_mask_of_the_text_matters(model):
    text = random_text(6, 2)
    unmasked = type(text)(text.ids, torch.ones_like(text.mask))
    features = random_features(2, 1)
    expected = levels_of_transformers(model, features[:, 0], text)
    assert difference_in_levels(model(features, unmasked).levels, expected) > 100 * FLOAT32_HIDDEN


@torch.no_grad()
def test_the_temporal_table_is_added_to_the_frames_of_its_rows():
    model = build_qformer()
    text = random_text(4)
    features = random_features(1, 3)
    still = model(features, text).levels
    by_hand = features + model.frame_positions.weight[:3][None, :, None]
    torch.nn.init.zeros_(model.frame_positions.weight)
    assert difference_in_levels(model(by_hand, text).levels, still) <= FLOAT32_HIDDEN
    assert difference_in_levels(model(features, text).levels, still) > 100 * FLOAT32_HIDDEN
