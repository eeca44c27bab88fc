"""Text to ids and back with the bundled tokenizers: frames of prompts and answers, padding, cutting, decoding."""

import json
import shutil

import pytest
import torch

from pipeline.settings.config import resolve
from stages.data.cards import load_card
from stages.errors import UserError
from stages.networks.tokens import Tokenizers
from stages.weights.repository import Repository

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


FRAME = "what is {} of the movie?"
WORDS = "the scene and the genre and the year"


@pytest.mark.parametrize("setting", ["language.max_prompt_tokens=14", "qformer.max_text_tokens=14"])
def test_a_long_prompt_loses_the_beginning_of_its_question_and_nothing_of_its_frame(setting):
    tokenizers = load(setting)
    assert tokenizers.num_too_long([FRAME.replace("{}", WORDS)]) == 1
    fitted = tokenizers.fitted(WORDS, FRAME)
    before, after = FRAME.split("{}")
    left = fitted.removeprefix(before).removesuffix(after)
    assert fitted == before + left + after
    assert WORDS.endswith(f" {left}")
    assert tokenizers.num_too_long([fitted]) == 0
    longer = WORDS[: -len(left) - 1].rpartition(" ")[2] + " " + left
    assert tokenizers.num_too_long([FRAME.replace("{}", longer)]) == 1, "no word more than needed is lost"


def test_a_prompt_that_fits_is_read_as_it_is(tokenizers):
    assert tokenizers.fitted(SHORT) == SHORT
    assert tokenizers.fitted("the scene", FRAME) == "what is the scene of the movie?"
    assert tokenizers.fitted("why {x}?") == "why {x}?", "braces of a question are just text"


def test_a_question_of_one_long_word_is_cut_within_the_word():
    fitted = load("language.max_prompt_tokens=12").fitted("a" * 300, "what {}?")
    assert fitted.startswith("what a")
    assert fitted.endswith("a?")
    assert 7 < len(fitted) < 300


def test_a_frame_that_is_too_long_by_itself_is_refused():
    with pytest.raises(UserError, match=r"the prompt 'what is \{\} of the movie\?': the text around a question is too"):
        load("language.max_prompt_tokens=3").fitted("it", FRAME)


def test_prompts_that_are_too_long_are_counted_with_their_repetitions():
    tokenizers = load("language.max_prompt_tokens=10")
    assert tokenizers.num_too_long([SHORT, LONG, LONG, SHORT]) == 2


# --- questions of the Q-Former


def test_questions_are_framed_and_padded_on_the_right(tokenizers):
    question = tokenizers.question([SHORT, LONG])
    length = int(question.mask[0].sum())
    assert length < question.ids.shape[1]
    assert question.mask[0].tolist() == [True] * length + [False] * (question.ids.shape[1] - length)
    names = tokenizers.qformer.convert_ids_to_tokens(question.ids[0])
    assert (names[0], names[length - 1], set(names[length:])) == ("[CLS]", "[SEP]", {"[PAD]"})


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


# --- candidates, and answers that are too long


def test_candidates_are_answers_with_their_end_padded_on_the_right(tokenizers):
    answers = ["office", "ex-boyfriend ex-girlfriend", "3"]
    found = tokenizers.candidates(answers)
    for row, answer in enumerate(answers):
        expected = [*plain(tokenizers, answer), tokenizers.special.end_id]
        assert found.ids[row][found.mask[row]].tolist() == expected
        assert found.mask[row].tolist() == sorted(found.mask[row].tolist(), reverse=True)
    trained = tokenizers.training([SHORT] * 3, answers)
    assert trained.ids[trained.answer_mask].tolist() == found.ids[found.mask].tolist(), "as in training"


def test_an_answer_needs_room_for_its_tokens_and_none_for_its_end(tokenizers):
    length = len(plain(tokenizers, "ex-boyfriend ex-girlfriend"))
    answers = ["office", "ex-boyfriend ex-girlfriend"]
    assert tokenizers.longer_than(answers, length) == {}
    assert tokenizers.longer_than(answers, length - 1) == {"ex-boyfriend ex-girlfriend": length}


# --- tokenizers and networks that do not belong together


@pytest.fixture
def folder(tmp_path):
    """The bundled checkpoint's configuration and tokenizers, to be changed."""
    bundled = Repository("bundled:tiny-instructblip").folder
    return shutil.copytree(bundled, tmp_path / "changed", ignore=shutil.ignore_patterns("*.safetensors"))


def change(path, **changed):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def rename_tokens(folder, names):
    """Give tokens other names and leave their ids."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {names.get(name, name): number for name, number in vocabulary.items()}
    for entry in content["added_tokens"]:
        entry["content"] = names.get(entry["content"], entry["content"])
    path.write_text(json.dumps(content))


def refusal(*overrides):
    with pytest.raises(UserError) as caught:
        load(*overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_language_model_of_another_kind_has_its_own_start_and_end(folder, tokenizers):
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 600}))
    special = load(f"language.source={folder}").special
    vocabulary = tokenizers.language.get_vocab()
    assert (special.start_id, special.end_id) == (vocabulary["<s>"], vocabulary["</s>"])
    change(folder / "tokenizer_config.json", bos_token=None)
    special = load(f"language.source={folder}").special
    assert special.start_id == special.end_id == vocabulary["</s>"]
    change(folder / "tokenizer_config.json", eos_token=None)
    assert "the tokenizer has no end-of-text token" in refusal(f"language.source={folder}")


def with_rows(folder, part, rows):
    described = json.loads((folder / "config.json").read_text())
    change(folder / "config.json", **{part: {**described[part], "vocab_size": rows}})


@pytest.mark.parametrize(("rows", "refused"), [(31_999, False), (32_000, True), (32_064, True), (128_256, False)])
def test_in_llamas_vocabulary_the_end_token_is_2(folder, rows, refused):
    with_rows(folder, "text_config", rows)
    assert load(f"language.source={folder}").special.end_id == 2
    rename_tokens(folder, {"<s>": "</s>", "</s>": "<s>"})
    if refused:
        said = refusal(f"language.source={folder}")
        assert said.startswith(f"{folder}: </s> has another id than in LLaMA's vocabulary")
        assert "got 1; allowed: 2" in said
    else:
        assert load(f"language.source={folder}").special.end_id == 1


def test_an_instructblip_without_its_end_token_is_refused(folder):
    rename_tokens(folder, {"</s>": "<end>"})
    change(folder / "tokenizer_config.json", eos_token="<end>", pad_token="<end>")
    assert f"{folder}: the tokenizer has no </s>" in refusal(f"language.source={folder}")


@pytest.mark.parametrize(
    ("branch", "part", "where"),
    [("language", "text_config", ""), ("qformer", "qformer_config", "/qformer_tokenizer")],
)
def test_ids_that_the_network_does_not_know_are_refused(folder, tokenizers, branch, part, where):
    largest = max(getattr(tokenizers, branch).get_vocab().values())
    with_rows(folder, part, largest)
    said = refusal(f"{branch}.source={folder}")
    assert said.startswith(f"{folder}{where}: the tokenizer knows more than the network, whose embedding has {largest}")
    assert f"has id {largest}; allowed: ids below {largest}" in said
    with_rows(folder, part, largest + 1)
    load(f"{branch}.source={folder}")


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
