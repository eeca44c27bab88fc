"""Text to ids and back with the bundled tokenizers: frames of prompts and answers, padding, cutting, decoding."""

import pytest
import torch

from pipeline.config import resolve
from stages.cards import load_card
from stages.errors import UserError
from stages.tokens import Tokenizers

SHORT, LONG = "what is the scene of the movie?", "what is the relationship of the movie and what is the year?"


@pytest.fixture(scope="module")
def tokenizers():
    return Tokenizers.load(resolve(preset="tiny").config)


def load(*overrides):
    return Tokenizers.load(resolve(preset="tiny", overrides=overrides).config)


def plain(tokenizers, text):
    return tokenizers.language(text, add_special_tokens=False)["input_ids"]


# --- the frame of prompts and answers


def test_start_and_end_are_both_the_end_of_text_token(tokenizers):
    end = tokenizers.language.convert_tokens_to_ids("</s>")
    assert (tokenizers.special.start_id, tokenizers.special.end_id) == (end, end)


def test_a_training_row_is_start_prompt_answer_end(tokenizers):
    tokens = tokenizers.training([SHORT], ["office"])
    end = tokenizers.special.end_id
    assert tokens.ids[0].tolist() == [end, *plain(tokenizers, SHORT), *plain(tokenizers, "office"), end]
    assert tokens.mask.all()


def test_the_answer_mask_covers_exactly_the_answer_and_its_end(tokenizers):
    prompts, answers = [SHORT, LONG, SHORT], ["office", "3", "ex-boyfriend ex-girlfriend"]
    tokens = tokenizers.training(prompts, answers)
    for row, answer in enumerate(answers):
        predicted = tokens.ids[row][tokens.answer_mask[row]].tolist()
        assert predicted == [*plain(tokenizers, answer), tokenizers.special.end_id]
    assert not (tokens.answer_mask & ~tokens.mask).any()


def test_training_rows_are_padded_on_the_right(tokenizers):
    tokens = tokenizers.training([SHORT, LONG], ["office", "office"])
    lengths = tokens.mask.sum(1).tolist()
    assert lengths[0] < lengths[1] == tokens.ids.shape[1]
    for row, length in enumerate(lengths):
        assert tokens.mask[row, :length].all()
        assert (tokens.ids[row, length:] == tokenizers.special.end_id).all()
    alone = tokenizers.training([SHORT], ["office"])
    assert torch.equal(tokens.ids[0, : lengths[0]], alone.ids[0]), "a row does not depend on its neighbours"


def test_prompts_for_generation_are_padded_on_the_left(tokenizers):
    ids, mask = tokenizers.prompts([SHORT, LONG])
    missing = int((~mask[0]).sum())
    assert missing > 0
    assert not mask[0, :missing].any()
    assert mask[0, missing:].all()
    assert mask[1].all()
    assert ids[0, missing:].tolist() == [tokenizers.special.start_id, *plain(tokenizers, SHORT)]
    assert ids[1].tolist() == [tokenizers.special.start_id, *plain(tokenizers, LONG)]


def test_a_prompt_is_read_the_same_in_training_and_in_generation(tokenizers):
    ids, _ = tokenizers.prompts([LONG])
    tokens = tokenizers.training([LONG], ["office"])
    assert torch.equal(tokens.ids[0][~tokens.answer_mask[0]], ids[0])


def test_a_long_prompt_loses_its_end_and_keeps_start_and_answer():
    tokenizers = load("language.max_prompt_tokens=4")
    tokens = tokenizers.training([LONG], ["office"])
    prompt = tokens.ids[0][~tokens.answer_mask[0]].tolist()
    assert prompt == [tokenizers.special.start_id, *plain(tokenizers, LONG)[:3]]
    assert tokenizers.prompts([LONG])[0][0].tolist() == prompt
    assert tokens.answer_mask.sum() == len(plain(tokenizers, "office")) + 1


# --- questions of the Q-Former


def test_questions_are_framed_and_padded_on_the_right(tokenizers):
    question = tokenizers.question([SHORT, LONG])
    length = int(question.mask[0].sum())
    assert length < question.ids.shape[1]
    assert question.mask[0].tolist() == [True] * length + [False] * (question.ids.shape[1] - length)
    names = tokenizers.qformer.convert_ids_to_tokens(question.ids[0])
    assert (names[0], names[length - 1], set(names[length:])) == ("[CLS]", "[SEP]", {"[PAD]"})


def test_a_question_that_is_too_long_loses_its_beginning():
    tokenizers = load("qformer.max_text_tokens=8")
    whole = tokenizers.qformer(LONG)["input_ids"]
    cut = tokenizers.question([LONG, SHORT]).ids[0].tolist()
    assert len(whole) > 8
    assert cut == [whole[0], *whole[-7:]]


# --- decoding


def test_every_label_of_the_synthetic_card_survives_the_round_trip(tokenizers):
    labels = [label for task in load_card("synthetic").tasks.values() for label in task.labels]
    rows = [[*plain(tokenizers, label), tokenizers.special.end_id] for label in labels]
    width = max(map(len, rows))
    ids = torch.tensor([[row + [tokenizers.special.end_id] * (width - len(row))] for row in rows])
    assert tokenizers.decode(ids) == [[label] for label in labels]


def test_every_label_and_its_end_fit_into_an_answer_of_the_tiny_preset(tokenizers):
    """A label that is longer could be learned but never generated."""
    config = resolve(preset="tiny").config
    labels = [label for task in load_card("synthetic").tasks.values() for label in task.labels]
    longest = max(labels, key=lambda label: len(plain(tokenizers, label)))
    assert len(plain(tokenizers, longest)) < config.language.max_new_tokens, longest


def test_beams_are_decoded_one_by_one_in_their_order(tokenizers):
    rows = [plain(tokenizers, "office")[:1], plain(tokenizers, "hotel")[:1]]
    ids = torch.tensor([rows, rows[::-1]])
    decoded = tokenizers.decode(ids)
    assert [len(beams) for beams in decoded] == [2, 2]
    assert decoded[0] == decoded[1][::-1]


# --- sources that are no tokenizers


def test_a_folder_without_a_tokenizer_is_one_error_that_names_it(tmp_path):
    with pytest.raises(UserError, match=rf"^{tmp_path}: file tokenizer_config\.json is missing"):
        load(f"language.source={tmp_path}")
    with pytest.raises(UserError, match=r"^bundled:tiny-dit: file qformer_tokenizer/tokenizer_config\.json is missing"):
        load("qformer.source=bundled:tiny-dit")


def test_a_folder_with_half_a_tokenizer_is_one_error_that_names_it(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError) as caught:
        load(f"language.source={tmp_path}")
    assert str(caught.value).startswith(f"{tmp_path}: no tokenizer: ")
    assert "\n" not in str(caught.value)


def test_a_hub_id_that_cannot_be_reached_is_one_error_that_names_it(monkeypatch):
    # The environment variable counts only before the hub's client is imported.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="the model hub gave no answer; got 'nobody/nothing-at-all'; allowed: a hub id"):
        load("language.source=nobody/nothing-at-all")
