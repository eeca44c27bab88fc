"""Equation 8 and the beam search against the plain language model, one sample at a time."""

import pytest
import torch
from tiny_language import END, START, VOCABULARY, WIDTH, build_language, build_model
from tiny_qformer import random_features, random_text
from tolerances import FLOAT32_LOSS

from model.config import LanguageConfig
from model.diff_lmm import Clips
from model.language import AnswerTokens

Q = 3
SAMPLES = [([5, 6, 7], [8]), ([9], [10, 11, 12]), ([13, 14, 15, 16, 17], [18, 19])]  # prompt, answer


@pytest.fixture
def queries():
    return torch.randn(len(SAMPLES), Q, WIDTH)


def batch_of(samples, *, extra_padding=0, fill=END):
    """[start, prompt, answer, end], padded on the right."""
    rows = [[START, *prompt, *answer, END] for prompt, answer in samples]
    length = max(map(len, rows)) + extra_padding
    ids = torch.tensor([row + [fill] * (length - len(row)) for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (length - len(row)) for row in rows])
    answer_mask = torch.zeros_like(mask)
    for index, (prompt, answer) in enumerate(samples):
        answer_mask[index, 1 + len(prompt) : 2 + len(prompt) + len(answer)] = True
    return AnswerTokens(ids, mask, answer_mask)


def loss_of_transformers(llama, queries, prompt, answer):
    """Cross entropy of one sample, unpadded, by the model's own `labels`; and the number of predicted tokens."""
    ids = torch.tensor([[START, *prompt, *answer, END]])
    embeddings = torch.cat([queries[None], llama.get_input_embeddings()(ids)], dim=1)
    labels = torch.tensor([[-100] * (Q + 1 + len(prompt)) + [*answer, END]])
    return llama(inputs_embeds=embeddings, labels=labels).loss, len(answer) + 1


def test_equation_8_is_the_mean_over_the_answers_tokens_sample_by_sample(queries):
    language = build_language()
    parts = [
        loss_of_transformers(language.model, row, prompt, answer)
        for row, (prompt, answer) in zip(queries, SAMPLES, strict=True)
    ]
    expected = sum(loss * tokens for loss, tokens in parts) / sum(tokens for _, tokens in parts)
    loss = language.answer_loss(queries, batch_of(SAMPLES))
    assert loss.item() == pytest.approx(expected.item(), rel=FLOAT32_LOSS)


def test_equation_8_sends_the_unpadded_gradient_to_the_queries(queries):
    language = build_language()
    queries.requires_grad_()
    language.answer_loss(queries, batch_of(SAMPLES)).backward()
    actual, queries.grad = queries.grad, None
    parts = [
        loss_of_transformers(language.model, row, prompt, answer)
        for row, (prompt, answer) in zip(queries, SAMPLES, strict=True)
    ]
    (sum(loss * tokens for loss, tokens in parts) / sum(tokens for _, tokens in parts)).backward()
    torch.testing.assert_close(actual, queries.grad, rtol=FLOAT32_LOSS, atol=FLOAT32_LOSS)


def test_padding_changes_nothing_in_equation_8(queries):
    language = build_language()
    expected = language.answer_loss(queries, batch_of(SAMPLES)).item()
    padded = language.answer_loss(queries, batch_of(SAMPLES, extra_padding=4, fill=7)).item()
    assert padded == pytest.approx(expected, rel=FLOAT32_LOSS)


def test_predicting_one_position_early_would_show(queries):
    language = build_language()
    tokens = batch_of(SAMPLES)
    shifted = AnswerTokens(tokens.ids, tokens.mask, tokens.answer_mask.roll(-1, dims=1))
    right, wrong = language.answer_loss(queries, tokens), language.answer_loss(queries, shifted)
    assert wrong.item() != pytest.approx(right.item(), rel=100 * FLOAT32_LOSS)


PROMPTS = [[START, 5, 6, 7, 8, 9], [START, 10], [START, 11, 12, 13]]


def left_padded(prompts, *, extra_padding=0):
    length = max(map(len, prompts)) + extra_padding
    ids = torch.tensor([[END] * (length - len(row)) + row for row in prompts])
    mask = torch.tensor([[False] * (length - len(row)) + [True] * len(row) for row in prompts])
    return ids, mask


def filled(ids, length):
    """Answers padded to `length` with the end token."""
    return torch.nn.functional.pad(ids, (0, length - ids.shape[-1]), value=END)


@pytest.mark.parametrize("settings", [{}, {"length_penalty": 0.0, "max_new_tokens": 10}, {"num_beams": 1}])
def test_answers_of_a_left_padded_batch_are_those_of_each_prompt_alone(queries, settings):
    language, config = build_language(), LanguageConfig(**settings)
    together = language.generate(queries, *left_padded(PROMPTS), config)
    padded = language.generate(queries, *left_padded(PROMPTS, extra_padding=3), config)
    assert together.ids.shape[:2] == (len(PROMPTS), config.num_beams)
    for index, prompt in enumerate(PROMPTS):
        alone = language.generate(queries[index : index + 1], *left_padded([prompt]), config)
        for answers in (together, padded):
            assert torch.equal(answers.ids[index], filled(alone.ids[0], answers.ids.shape[2]))
            torch.testing.assert_close(
                answers.log_probability[index], alone.log_probability[0], rtol=FLOAT32_LOSS, atol=FLOAT32_LOSS
            )


def test_the_queries_decide_the_answer(queries):
    language = build_language()
    prompts = left_padded(PROMPTS)
    told = language.generate(queries, *prompts, LanguageConfig()).ids
    other = language.generate(-queries, *prompts, LanguageConfig()).ids
    assert not torch.equal(told, other)


@torch.no_grad()
def greedy_by_hand(llama, queries, prompt, max_new_tokens):
    """Most likely next token again and again, and the summed log-probability."""
    ids, total = list(prompt), 0.0
    for _ in range(max_new_tokens):
        embeddings = torch.cat([queries[None], llama.get_input_embeddings()(torch.tensor([ids]))], dim=1)
        log_probability = llama(inputs_embeds=embeddings).logits[0, -1].log_softmax(-1)
        ids.append(log_probability.argmax().item())
        total += log_probability.max().item()
        if ids[-1] == END:
            break
    return ids[len(prompt) :], total


@torch.no_grad()
def language_that_stops(queries):
    """A model whose greedy answers end at different lengths: the end token takes the place of one often chosen."""
    language = build_language()
    unstopped = [greedy_by_hand(language.model, row, [START, 5], 6)[0] for row in queries]
    often = torch.tensor(unstopped)[:, 1:].flatten().mode().values
    language.model.lm_head.weight[END] = 1.1 * language.model.lm_head.weight[often]
    return language


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_one_beam_is_the_greedy_answer_with_its_score(length_penalty):
    queries = torch.randn(8, Q, WIDTH)
    language = language_that_stops(queries)
    prompts = [PROMPTS[index % len(PROMPTS)] for index in range(8)]
    config = LanguageConfig(
        num_beams=1, max_new_tokens=6, min_new_tokens=0, repetition_penalty=1.0, length_penalty=length_penalty
    )
    answers = language.generate(queries, *left_padded(prompts), config)
    lengths = set()
    for index, prompt in enumerate(prompts):
        ids, total = greedy_by_hand(language.model, queries[index], prompt, config.max_new_tokens)
        lengths.add(len(ids))
        assert torch.equal(answers.ids[index, 0], filled(torch.tensor(ids), answers.ids.shape[2]))
        expected = total / len(ids) ** length_penalty
        assert answers.log_probability[index, 0].item() == pytest.approx(expected, rel=1e-4)
    assert len(lengths) > 1


def test_answers_end_at_the_end_token_whatever_the_checkpoint_says():
    queries = torch.randn(8, Q, WIDTH)
    language = language_that_stops(queries)
    answers = language.generate(queries, *left_padded([[START, 5]] * 8), LanguageConfig(max_new_tokens=10)).ids
    after = ((answers == END).cumsum(-1) - (answers == END).long()) > 0
    assert after.any()
    assert (answers[after] == END).all()
    language.model.generation_config.eos_token_id = VOCABULARY - 1
    language.model.generation_config.pad_token_id = VOCABULARY - 2
    same = language.generate(queries, *left_padded([[START, 5]] * 8), LanguageConfig(max_new_tokens=10)).ids
    assert torch.equal(same, answers)


def test_an_answer_that_fills_the_room_is_returned_without_its_end():
    """So a label of as many tokens as there is room for can be right, and one of more tokens cannot."""
    answers = build_language().generate(torch.randn(8, Q, WIDTH), *left_padded([[START, 5]] * 8), LanguageConfig()).ids
    assert answers.shape[-1] == LanguageConfig().max_new_tokens
    assert (answers[:, 0] != END).all(-1).any()


@torch.no_grad()
def test_an_answer_may_be_empty():
    """MA-LMM's min_length of 1 is the start token alone."""
    language, prompts = build_language(), left_padded([[START, 5]] * 8)
    often = language.generate(torch.zeros(8, Q, WIDTH), *prompts, LanguageConfig()).ids[0, 0, 0]
    language.model.lm_head.weight[END] = 1.5 * language.model.lm_head.weight[often]
    settings = LanguageConfig(), LanguageConfig(min_new_tokens=1)
    empty, one = (language.generate(torch.zeros(8, Q, WIDTH), *prompts, config).ids[:, 0] for config in settings)
    assert (empty == END).all()
    assert (one[:, 0] != END).all()


def clips():
    return Clips(
        features=random_features(3, 4),
        targets=torch.randn(3, 4, 12),
        question=random_text(5, 2, 3),
        answer=batch_of(SAMPLES),
    )


def test_a_training_step_changes_every_trained_part_and_no_bit_of_the_language_model():
    model = build_model().train()
    frozen = {name: parameter.clone() for name, parameter in model.language.named_parameters()}
    trained = model.trained_parameters()
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    assert not any(parameter.requires_grad for parameter in model.language.parameters())
    optimizer = torch.optim.AdamW(trained.values(), lr=0.1, weight_decay=0.0)
    model(clips()).total.backward()
    optimizer.step()
    assert all(parameter.grad is None for parameter in model.language.parameters())
    assert all(torch.equal(parameter, frozen[name]) for name, parameter in model.language.named_parameters())
    assert {name for name, _ in model.named_parameters()} == trained.keys() | {f"language.{name}" for name in frozen}
    # No answer and no bank reads what the last layer says about the text.
    unread = tuple(f"qformer.qformer.encoder.layer.11.{part}." for part in ("intermediate", "output"))
    still = [name for name, value in before.items() if torch.equal(trained[name], value)]
    assert [name for name in still if not name.startswith(unread)] == []


def test_training_mode_leaves_the_language_model_in_eval_mode():
    model = build_model().train()
    assert model.qformer.training
    assert model.alignment.training
    assert not any(part.training for part in model.language.modules())


def test_following_a_stream_equals_watching_the_whole_clip():
    model = build_model().eval()
    features, question = random_features(2, 7), random_text(5, 2)
    whole, memory = model.watch(features, question)
    _, halfway = model.watch(features[:, :4], question)
    told, end = model.watch(features[:, 4:], question, halfway)
    torch.testing.assert_close(told, whole, rtol=1e-4, atol=1e-4)
    assert end.frames_seen == memory.frames_seen == 7
