"""The recipe of the tiny networks, part by part: what captions say, what each loss is, what a batch holds."""

import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from recipes.small_world.captions import DETAILS, WORDS, captions
from recipes.small_world.contrast import _groups, _some, contrastive_loss
from recipes.small_world.diffusion import NULL_CLASS, NUM_CLASSES, classes_of, noise_schedule, train_dit
from recipes.small_world.frames import Frames, draw
from recipes.small_world.optimise import optimise
from recipes.small_world.reading import example
from recipes.small_world.settings import read_settings
from recipes.small_world.vae import _edge_error, encode, pixels_of, train_vae
from stages.data.cards import load_card
from stages.data.synthetic.drawing import draw_frames
from stages.data.synthetic.plan import LABELS, plan_videos
from stages.errors import UserError

CPU = torch.device("cpu")
SETTINGS = read_settings()


def every_label():
    """Labels [4, 7]: the first of each task, the second, and so on."""
    return torch.arange(4)[:, None].repeat(1, len(LABELS))


@pytest.fixture(scope="module")
def frames():
    return draw(SETTINGS.frames.model_copy(update={"videos": 24, "each": 2}), size_px=64)


# --- settings


def test_a_misspelt_setting_is_refused_with_its_place(tmp_path):
    text = (tmp_path / "config.yaml").resolve()
    text.write_text("sed: 1\n")
    with pytest.raises(UserError, match=r"config\.yaml"):
        read_settings(text)


# --- frames


def test_frames_show_what_their_labels_say(frames):
    specs = plan_videos(SETTINGS.frames.world_seed, {"train": 24})
    assert frames.images.shape == (48, 64, 64, 3)
    assert frames.images.dtype == torch.uint8
    for task, labels in LABELS.items():
        assert [labels[index] for index in frames.label(task)[::2]] == [spec.labels[task] for spec in specs]
    assert torch.equal(frames.labels[::2], frames.labels[1::2])


def test_the_networks_see_no_video_of_the_evaluation_nor_of_the_probes():
    times_s = np.array([0.0])
    seen = {
        name: {draw_frames(spec.labels, spec.seed, times_s).tobytes() for spec in plan_videos(seed, sizes)}
        for name, seed, sizes in (
            ("learned from", SETTINGS.frames.world_seed, {"train": 40}),
            ("probed with", SETTINGS.probe_seed, {"train": 40, "test": 40}),
            ("the demo's", 0, {"train": 40, "val": 40, "test": 40}),
        )
    }
    assert [len(pictures) for pictures in seen.values()] == [40, 80, 120]
    assert len(set().union(*seen.values())) == 240


# --- the tower


def text_of(ids):
    return " ".join(WORDS[number - 1] for number in ids.tolist() if number)


def test_captions_speak_of_all_but_place_and_motion():
    draw_from = torch.Generator().manual_seed(0)
    ids = captions(every_label(), names_detail=1.0, draw=draw_from)
    assert text_of(ids[0]) == "teal office bright warm grey film cross level stripes flat mouth"
    texts = [text_of(row) for row in captions(every_label().repeat(50, 1), names_detail=0.6, draw=draw_from)]
    words = {word for text in texts for word in text.split()}
    assert not words & {"left", "right", "top", "bottom", "corner", "moves", "turns", "still", "disc", "discs"}
    # Another relationship, which only motion shows, is no other caption.
    turned = every_label()
    turned[:, list(LABELS).index("relationship")] = 0
    assert torch.equal(captions(turned, names_detail=1.0, draw=draw_from), ids)


def test_details_are_named_as_often_as_asked():
    draw_from = torch.Generator().manual_seed(0)
    ids = captions(torch.zeros(4000, len(LABELS), dtype=torch.long), names_detail=0.6, draw=draw_from)
    texts = [text_of(row) for row in ids]
    for detail in ("cross", "level stripes", "flat mouth"):
        assert np.mean([detail in text for text in texts]) == pytest.approx(0.6, abs=0.03)
    assert len(DETAILS) == 3
    assert all(text.startswith("teal office bright warm grey film") for text in texts)


def test_the_contrastive_loss_by_hand():
    similarities = torch.tensor([[2.0, 0.0], [1.0, 3.0]])
    different = torch.tensor([[1, 2], [1, 3]])
    rows = math.log(1 + math.exp(-2)), math.log(1 + math.exp(-2))
    columns = math.log(1 + math.exp(-1)), math.log(1 + math.exp(-3))
    expected = (sum(rows) / 2 + sum(columns) / 2) / 2
    assert float(contrastive_loss(similarities, different)) == pytest.approx(expected, rel=1e-6)
    # Two frames with one caption are each other's match: no similarity between them is wrong.
    same = torch.tensor([[1, 2], [1, 2]])
    equal = torch.zeros(2, 2)
    assert float(contrastive_loss(equal, same)) == pytest.approx(math.log(2), rel=1e-6)
    assert float(contrastive_loss(similarities, same)) != pytest.approx(expected, rel=1e-3)


def test_a_group_has_one_scene_light_and_look(frames):
    groups = _groups(frames)
    assert sorted(torch.cat(groups).tolist()) == list(range(48))
    for group in groups:
        picked = _some(group, 5, torch.Generator().manual_seed(0))
        assert len(picked) == 5
        for task in ("scene", "genre", "year"):
            assert len(set(frames.label(task)[picked].tolist())) == 1


# --- the teacher


def test_the_edge_error_counts_differences_of_neighbours_alone():
    error = torch.full((1, 3, 4, 4), 0.5)
    assert float(_edge_error(error)) == 0
    error[..., 2:] = 1.5  # one step of 1 between columns 1 and 2: a third of the differences along rows
    assert float(_edge_error(error)) == pytest.approx(1 / 3)


def test_latents_have_deviation_one_and_are_what_the_teacher_reads(frames):
    settings = SETTINGS.vae.model_copy(update={"steps": 2, "batch": 4})
    vae, trained = train_vae(settings, frames, seed=1, device=CPU)
    assert trained.steps == 2
    latents = encode(vae, frames.images)
    assert latents.shape == (48, 4, 8, 8)
    assert float(latents.std()) == pytest.approx(1, abs=0.01)
    mode = vae.encode(pixels_of(frames.images[:3])).latent_dist.mode()
    torch.testing.assert_close(latents[:3], mode * vae.config.scaling_factor, rtol=1e-3, atol=1e-4)


def test_the_schedule_is_the_published_one():
    """As DiT's: linear betas from 1e-4 to 0.02 in 1,000 steps; Eq. 2 with their products."""
    schedule = noise_schedule()
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
    clean, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    steps = torch.tensor([0, 700])
    by_hand = kept[steps].sqrt().view(2, 1, 1, 1) * clean + (1 - kept[steps]).sqrt().view(2, 1, 1, 1) * noise
    torch.testing.assert_close(schedule.add_noise(clean, noise, steps), by_hand, rtol=1e-5, atol=1e-5)


def test_an_untrained_dit_predicts_zero_so_that_its_first_loss_is_one():
    """Eq. 3: the mean square of the noise, whose variance is 1."""
    latents, classes = torch.randn(64, 4, 8, 8), torch.randint(NUM_CLASSES, (64,))
    settings = SETTINGS.diffusion.model_copy(update={"steps": 1})
    dit, trained = train_dit(settings, latents, classes, seed=0)
    assert trained.loss == pytest.approx(1, abs=0.05)
    assert dit.config.num_embeds_ada_norm == NULL_CLASS == 16
    assert dit.config.sample_size == 8


def test_the_moving_average_is_kept_and_not_the_last_weights():
    latents, classes = torch.randn(64, 4, 8, 8), torch.randint(NUM_CLASSES, (64,))
    few = SETTINGS.diffusion.model_copy(update={"steps": 3, "batch": 8, "layers": 1})
    last, _ = train_dit(few.model_copy(update={"ema": 0.0}), latents, classes, seed=0)
    first, _ = train_dit(few.model_copy(update={"ema": 1.0}), latents, classes, seed=0)
    half, _ = train_dit(few.model_copy(update={"ema": 0.5}), latents, classes, seed=0)
    start, between, end = (model.proj_out_2.bias.abs().sum() for model in (first, half, last))
    assert start == 0
    assert 0 < between < end


def test_classes_are_scene_and_genre(frames):
    expected = frames.label("scene") * 4 + frames.label("genre")
    assert torch.equal(classes_of(frames), expected)
    pairs = Frames(torch.zeros(16, 1, 1, 3), torch.zeros(16, len(LABELS), dtype=torch.long))
    pairs.labels[:, list(LABELS).index("scene")] = torch.arange(16) // 4
    pairs.labels[:, list(LABELS).index("genre")] = torch.arange(16) % 4
    assert classes_of(pairs).tolist() == list(range(NUM_CLASSES))


# --- the loop and the reader


def test_the_loop_warms_up_and_comes_down(capsys):
    weight = torch.nn.Parameter(torch.tensor([4.0]))
    trained = optimise("x", [weight], lambda _: F.mse_loss(weight, torch.zeros(1)), steps=300, lr=0.1)
    assert abs(weight.item()) < 0.1
    assert trained.steps == 300
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()] == [
        "x: step 250 of 300",
        "x: step 300 of 300",
    ]


def test_every_caption_to_read_holds_the_answer():
    rng, card = random.Random(0), load_card("synthetic")
    for _ in range(200):
        caption, question, answer = example(card, rng)
        task = next(task for task in card.tasks.values() if task.prompt == question)
        assert answer in task.labels
        assert answer in caption
