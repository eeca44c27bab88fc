"""Ranking of given answers against the plain model, each [queries, prompt, candidate, end] on its own and unpadded.

Also the other ways of asking the language model, for families that know positions in other ways than LLaMA.
"""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_language import END, START, VOCABULARY, WIDTH, build_llama
from tolerances import FLOAT32_LOSS, largest_difference
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM, Qwen2Config, Qwen2ForCausalLM

from model.config import LanguageConfig
from model.language import AnswerTokens, Candidates, FrozenLanguageModel, SpecialTokens
from stages.errors import UserError
from stages.networks.build import load_language

Q = 3
PROMPTS = [[START, 5, 6, 7, 8, 9], [START, 10], [START, 11, 12, 13]]
# The second is a prefix of the third, the fifth of the fourth.
CANDIDATES = [[20, 21, 22, 23, 24], [30], [30, 31], [40, 41, 42], [40, 41], [25]]
SHAPE = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1}
ATOL = 10 * FLOAT32_LOSS


def build_gpt2():
    """Learned absolute positions, counted from 0."""
    return GPT2LMHeadModel(GPT2Config(**SHAPE, n_positions=64, n_embd=WIDTH, n_layer=2, n_head=2))


def build_opt():
    """Learned absolute positions with an offset."""
    return OPTForCausalLM(
        OPTConfig(
            **SHAPE,
            hidden_size=WIDTH,
            word_embed_proj_dim=WIDTH,
            ffn_dim=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
        )
    )


def build_qwen2():
    """Rotary positions, fewer keys than queries."""
    return Qwen2ForCausalLM(
        Qwen2Config(
            **SHAPE,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
        )
    )


@pytest.fixture(scope="module", params=[build_llama, build_gpt2, build_opt, build_qwen2])
def language(request, tmp_path_factory):
    """Written as transformers writes it, then read as Stage 2 reads it."""
    torch.manual_seed(1)
    built = request.param().eval()
    for name, parameter in built.named_parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=1.0 if "embed" in name or "wte" in name or "wpe" in name else 0.3)
    folder = tmp_path_factory.mktemp("language")
    built.save_pretrained(folder)
    read = load_language(LanguageConfig(source=str(folder)), torch.float32)
    assert type(read) is type(built)
    return FrozenLanguageModel(read, SpecialTokens(START, END))


@pytest.fixture
def queries():
    return torch.randn(len(PROMPTS), Q, WIDTH)


def left_padded(prompts, extra_padding=0):
    length = max(map(len, prompts)) + extra_padding
    ids = torch.tensor([[END] * (length - len(row)) + row for row in prompts])
    mask = torch.tensor([[False] * (length - len(row)) + [True] * len(row) for row in prompts])
    return ids, mask


def right_padded(rows):
    length = max(map(len, rows))
    ids = torch.tensor([row + [END] * (length - len(row)) for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (length - len(row)) for row in rows])
    return ids, mask


def candidates_of(rows):
    return Candidates(*right_padded([[*row, END] for row in rows]))


@torch.no_grad()
def plain_scores(model, queries, normalise):
    """One full forward for each sample and candidate."""
    scores = torch.zeros(len(PROMPTS), len(CANDIDATES))
    for row, prompt in enumerate(PROMPTS):
        for column, candidate in enumerate(CANDIDATES):
            answer = torch.tensor([*candidate, END])
            ids = torch.cat([torch.tensor(prompt), answer])[None]
            embeddings = torch.cat([queries[row : row + 1], model.get_input_embeddings()(ids)], dim=1)
            predicted = model(inputs_embeds=embeddings).logits[0, -1 - len(answer) : -1].log_softmax(-1)
            each = predicted.gather(1, answer[:, None])
            scores[row, column] = each.mean() if normalise == "mean" else each.sum()
    return scores


def rank(language, queries, *, normalise="mean", rows=1000, extra_padding=0, candidates=CANDIDATES):
    prompts = left_padded(PROMPTS[: len(queries)], extra_padding)
    return language.rank(queries, *prompts, candidates_of(candidates), normalise=normalise, rows=rows)


@pytest.mark.parametrize("normalise", ["mean", "sum"])
def test_the_ranking_is_that_of_full_forwards_one_by_one(language, queries, normalise):
    expected = plain_scores(language.model, queries, normalise)
    found = rank(language, queries, normalise=normalise)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=FLOAT32_LOSS, atol=ATOL)
    assert expected.std() > 100 * ATOL


@pytest.mark.parametrize("rows", [1, 3, 7, 12])
def test_passes_of_any_size_give_the_same_scores(language, queries, rows):
    torch.testing.assert_close(rank(language, queries, rows=rows), rank(language, queries), rtol=0, atol=ATOL)


def test_padding_of_prompts_and_candidates_changes_nothing(language, queries):
    whole = rank(language, queries)
    torch.testing.assert_close(rank(language, queries, extra_padding=4), whole, rtol=0, atol=ATOL)
    for column, candidate in enumerate(CANDIDATES):
        alone = rank(language, queries, candidates=[candidate])
        torch.testing.assert_close(alone[:, 0], whole[:, column], rtol=0, atol=ATOL)
    one = rank(language, queries[:1])
    torch.testing.assert_close(one, whole[:1], rtol=0, atol=ATOL)


def test_a_candidate_that_is_its_end_alone_is_scored_too(language, queries):
    found = rank(language, queries, candidates=[[], [30]])
    torch.testing.assert_close(found[:, 1], rank(language, queries)[:, 1], rtol=0, atol=ATOL)
    assert (found[:, 0] < 0).all()


def test_positions_that_count_padding_would_show(language, queries):
    right = rank(language, queries)
    language._takes_positions = False
    try:
        wrong = rank(language, queries)
    finally:
        language._takes_positions = True
    # OPT counts real tokens by itself.
    assert (largest_difference(wrong, right) > 100 * ATOL) == (language.model.config.model_type != "opt")


def test_equation_8_is_that_of_samples_alone_whatever_side_is_padded(language, queries):
    answers = [[20], [21, 22, 23], [24, 25]]
    rows = [[*prompt, *answer, END] for prompt, answer in zip(PROMPTS, answers, strict=True)]
    total, count = 0.0, 0
    for row, (ids, answer) in enumerate(zip(rows, answers, strict=True)):
        embeddings = language.model.get_input_embeddings()(torch.tensor([ids]))
        logits = language.model(inputs_embeds=torch.cat([queries[row : row + 1], embeddings], dim=1)).logits[0]
        wanted = torch.tensor([*answer, END])
        total += torch.nn.functional.cross_entropy(logits[-1 - len(wanted) : -1], wanted, reduction="sum").item()
        count += len(wanted)
    longest = max(map(len, rows))
    for ids, mask in (left_padded(rows), right_padded(rows)):
        answer_mask = torch.zeros_like(mask)
        for row, answer in enumerate(answers):
            end = longest if mask[row, -1] else len(rows[row])
            answer_mask[row, end - len(answer) - 1 : end] = True
        loss = language.answer_loss(queries, AnswerTokens(ids, mask, answer_mask)).item()
        assert loss == pytest.approx(total / count, rel=FLOAT32_LOSS)


def test_beams_of_a_left_padded_batch_are_those_of_each_prompt_alone(language, queries):
    config = LanguageConfig(max_new_tokens=4)
    together = language.generate(queries, *left_padded(PROMPTS), config)
    for row, prompt in enumerate(PROMPTS):
        alone = language.generate(queries[row : row + 1], *left_padded([prompt]), config)
        ids = torch.nn.functional.pad(alone.ids[0], (0, together.ids.shape[2] - alone.ids.shape[2]), value=END)
        assert torch.equal(together.ids[row], ids)
        torch.testing.assert_close(
            together.log_probability[row], alone.log_probability[0], rtol=FLOAT32_LOSS, atol=ATOL
        )


def test_a_beam_without_penalties_is_scored_as_the_ranking_scores_it(language):
    queries = torch.randn(8, Q, WIDTH)
    prompts = left_padded([PROMPTS[row % len(PROMPTS)] for row in range(8)])
    config = LanguageConfig(num_beams=3, max_new_tokens=6, min_new_tokens=0, repetition_penalty=1.0, length_penalty=0.0)
    # What the model often says is made the end token, so that beams do end.
    often = int(language.generate(queries, *prompts, config).ids[:, 0, 1:].mode().values.mode().values)
    language = FrozenLanguageModel(language.model, SpecialTokens(START, often))
    answers = language.generate(queries, *prompts, config)
    ended = (answers.ids[..., 1:] == often).any(-1).nonzero().tolist()
    assert ended
    for row, beam in ended:
        ids = answers.ids[row, beam].tolist()
        answer = Candidates(*right_padded([ids[: ids.index(often) + 1]]))
        one = [part[row : row + 1] for part in (queries, *prompts)]
        found = language.rank(*one, answer, normalise="sum", rows=1)
        assert found.item() == pytest.approx(answers.log_probability[row, beam].item(), abs=ATOL)


# --- language models that are not whole


@pytest.fixture
def folder(tmp_path):
    build_gpt2().save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder, change):
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def message_of(folder):
    with pytest.raises(UserError) as caught:
        load_language(LanguageConfig(source=str(folder)), torch.float32)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(folder))
    return str(caught.value)


def test_a_language_model_that_lacks_a_tensor_is_not_filled_with_random_numbers(folder):
    name = "transformer.h.1.mlp.c_fc.weight"
    rewrite(folder, lambda tensors: {key: value for key, value in tensors.items() if key != name})
    assert f"checkpoint lacks 1 tensor(s): {name}" in message_of(folder)


def test_a_misshapen_tensor_of_a_language_model_is_named_with_both_shapes(folder):
    name = "transformer.h.1.ln_1.weight"
    rewrite(folder, lambda tensors: {**tensors, name: tensors[name][1:].clone()})
    assert f"{name}: checkpoint ({WIDTH - 1},), model ({WIDTH},)" in message_of(folder)


def test_a_folder_of_no_language_model_is_refused(folder):
    (folder / "config.json").write_text('{"model_type": "vit"}')
    assert "no language model: " in message_of(folder)


def test_what_was_taken_from_a_language_model_is_told(folder):
    rewrite(folder, lambda tensors: {**tensors, "extra.weight": torch.ones(1)})
    reports = []
    model = load_language(LanguageConfig(source=str(folder)), torch.float32, reports.append)
    (report,) = reports
    # The output layer is the input embedding, which is stored once.
    assert set(report.taken) == set(model.state_dict()) - {"lm_head.weight"}
    assert report.left == ("extra.weight",)
    assert report.initialised == ()
