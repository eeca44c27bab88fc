"""The recipe's probes: ridge regression and its scores by hand, what is probed, and what is kept and told of it."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from recipes.small_world.cards import CARD, probe_table, write_cards
from recipes.small_world.diffusion import NULL_CLASS
from recipes.small_world.measure import _FIRST_S, BLOCKS, UNTRAINED, _probe, _see, _Seen
from recipes.small_world.probes import _STRENGTHS, _predict, class_accuracy, explained, r_squared, ridge
from recipes.small_world.record import Record, differences, load_record, save_record
from recipes.small_world.settings import read_settings
from recipes.small_world.sheet import _images, sample
from stages.data.synthetic.drawing import (
    EMBLEM_CORNER_PX,
    EMBLEM_PX,
    FACE_COLUMNS_PX,
    FACE_PX,
    FACE_ROWS_PX,
    GLYPH_PX,
    ORBIT_CENTRES_PX,
    STRIPE_SHIFTS,
    draw_video,
    emblem,
    face,
    glyph,
)
from stages.data.synthetic.plan import CLASSES, LABELS, plan_videos
from stages.errors import UserError

SETTINGS = read_settings().model_copy(update={"probe_videos": 16, "probe_held_out": 8})
TASKS = list(LABELS)
DIT_WIDTH = SETTINGS.diffusion.heads * SETTINGS.diffusion.head_width
ASKED = [*TASKS, "glyph place", "disc places"]


def numbers(*shape, seed=0):
    """Normal numbers, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- ridge regression


def test_ridge_by_hand():
    """x = -1, 0, 1 (deviation 1) and y = 0, 1, 5 (mean 2): the slope is 5 / (2 + strength)."""
    x, y = torch.tensor([[-1.0], [0.0], [1.0]]), torch.tensor([[0.0], [1.0], [5.0]], dtype=torch.float64)
    weak, strong = ridge(x, y, torch.tensor([[2.0], [0.0], [-1.0]]), [3.0, 8.0])
    assert weak.flatten().tolist() == pytest.approx([4.0, 2.0, 1.0], abs=1e-12)
    assert strong.flatten().tolist() == pytest.approx([3.0, 2.0, 1.5], abs=1e-12)


@pytest.mark.parametrize(("count", "width"), [(40, 7), (7, 40), (12, 12)])
def test_ridge_is_least_squares_with_rows_for_the_penalty(count, width):
    """Tall features are solved by features, wide ones by rows: both are what numpy finds."""
    train, targets, others = numbers(count, width), numbers(count, 3, seed=1), numbers(5, width, seed=2)
    rows, queries = (((x - train.mean(0)) / train.std(0)).numpy() for x in (train, others))
    centre = targets.mean(0).numpy()
    strengths = [0.5, 20.0]
    for strength, predicted in zip(strengths, ridge(train, targets, others, strengths), strict=True):
        penalised = np.vstack([rows, math.sqrt(strength) * np.eye(width)])
        wanted = np.vstack([targets.numpy() - centre, np.zeros((width, 3))])
        weights = np.linalg.lstsq(penalised, wanted, rcond=None)[0]
        np.testing.assert_allclose(predicted.numpy(), queries @ weights + centre, rtol=1e-9, atol=1e-9)


def test_constant_columns_do_no_harm_and_solving_by_rows_or_features_is_the_same():
    """30 columns that tell nothing make the features wider than there are rows, so that the other way is taken."""
    train, targets, others = numbers(20, 6), numbers(20, 2, seed=1), numbers(4, 6, seed=2)
    constants = torch.full((20, 30), 0.1, dtype=torch.float64)
    constants[:, 15:] += 1e-10 * numbers(20, 15, seed=4)  # as rounding leaves them
    wide = torch.cat([train, constants], 1)
    # Even where they are constant in the training part alone.
    asked = torch.cat([others, numbers(4, 30, seed=3)], 1)
    torch.testing.assert_close(ridge(wide, targets, asked, [2.0]), ridge(train, targets, others, [2.0]))


def test_the_scale_and_origin_of_features_do_not_matter():
    train, targets, others = numbers(20, 3), numbers(20, 1, seed=1), numbers(4, 3, seed=2)
    scale, origin = torch.tensor([1e3, 1.0, 1e-3]), torch.tensor([-5.0, 0.0, 7.0])
    moved = ridge(train * scale + origin, targets, others * scale + origin, [2.0])
    torch.testing.assert_close(moved, ridge(train, targets, others, [2.0]))


# --- scores


def test_r_squared_by_hand():
    """Truth 1, 2, 6: mean 3, total 4 + 1 + 9 = 14."""
    truth = torch.tensor([[1.0], [2.0], [6.0]])
    assert r_squared(torch.full((3, 1), 3.0), truth) == 0
    assert r_squared(truth, truth) == 1
    assert r_squared(torch.tensor([[1.0], [2.0], [3.0]]), truth) == pytest.approx(5 / 14)
    assert r_squared(torch.tensor([[6.0], [2.0], [1.0]]), truth) == pytest.approx(1 - 50 / 14)
    both = torch.tensor([[1.0, 3.0], [2.0, 3.0], [6.0, 3.0]])
    assert r_squared(both, truth.repeat(1, 2)) == pytest.approx(0.5)


@pytest.mark.parametrize("value", [0.0, 0.1])
def test_a_constant_target_has_no_r_squared(value):
    truth = torch.cat([numbers(3, 1), torch.full((3, 1), value, dtype=torch.float64)], 1)
    with pytest.raises(ValueError, match="column 1 of 3 rows"):
        r_squared(numbers(3, 2, seed=1), truth)
    with pytest.raises(ValueError, match="constant target"):
        explained(numbers(20, 2), numbers(20, 2, seed=1), numbers(3, 2, seed=2), truth)


def test_explained_is_near_one_for_a_planted_linear_signal_and_near_zero_for_none():
    train, held_out, weights = numbers(400, 5), numbers(200, 5, seed=1), numbers(5, 2, seed=2)
    assert explained(train, train @ weights, held_out, held_out @ weights) > 0.999
    assert abs(explained(train, numbers(400, 2, seed=3), held_out, numbers(200, 2, seed=4))) < 0.05


def test_classes_that_are_linear_in_the_features_are_found():
    train, held_out, weights = numbers(600, 6), numbers(300, 6, seed=1), numbers(6, 4, seed=2)
    labels, answers = (train @ weights).argmax(1), (held_out @ weights).argmax(1)
    assert class_accuracy(train, labels, held_out, answers, 4) > 0.85
    # Scored against others' answers it is no better than chance.
    assert class_accuracy(train, labels, held_out, answers.roll(1), 4) == pytest.approx(0.25, abs=0.1)


def test_an_exclusive_or_is_not_found_until_it_is_among_the_features():
    """No linear map of two signs tells whether they are equal; of their product, each does."""
    signs, held_out = numbers(800, 2).sign(), numbers(400, 2, seed=1).sign()
    labels, answers = (signs.prod(1) > 0).long(), (held_out.prod(1) > 0).long()
    assert class_accuracy(signs, labels, held_out, answers, 2) == pytest.approx(0.5, abs=0.1)
    products = [torch.cat([rows, rows.prod(1, keepdim=True)], 1) for rows in (signs, held_out)]
    assert class_accuracy(products[0], labels, products[1], answers, 2) == 1


# --- the strength


@pytest.mark.parametrize("best", _STRENGTHS)
def test_the_strength_is_chosen_on_the_last_fifth_of_the_training_rows(best):
    train, targets, held_out = numbers(10, 3), numbers(10, 1, seed=1), numbers(4, 3, seed=2)
    tried = ridge(train[:8], targets[:8], train[8:], _STRENGTHS)
    seen = []

    def score(predicted, rows):
        seen.append(rows)
        return float(torch.equal(predicted, tried[_STRENGTHS.index(best)]))

    predicted = _predict(train, targets, held_out, score)
    assert len(seen) == len(_STRENGTHS)
    assert all(torch.equal(rows, targets[8:]) for rows in seen)
    # With the strength chosen, all training rows count.
    assert torch.equal(predicted, ridge(train, targets, held_out, [best])[0])


def test_held_out_rows_matter_neither_to_the_strength_nor_to_each_other():
    """The last fifth contradicts the rest, so the strongest is chosen; held-out rows would favour the weakest."""
    train, held_out = numbers(100, 1), numbers(50, 1, seed=1)
    targets = torch.cat([train[:80], -train[80:]])
    strongest = r_squared(ridge(train, targets, held_out, _STRENGTHS[-1:])[0], held_out)
    weakest = r_squared(ridge(train, targets, held_out, _STRENGTHS[:1])[0], held_out)
    assert explained(train, targets, held_out, held_out) == strongest
    assert strongest < 0.1 < weakest
    others = torch.cat([held_out[:1], 1e6 * held_out[1:]])
    torch.testing.assert_close(
        _predict(train, targets, others, r_squared)[0], _predict(train, targets, held_out, r_squared)[0]
    )


# --- what is probed


@pytest.fixture(scope="module")
def specs():
    return plan_videos(SETTINGS.probe_seed, {"train": SETTINGS.probe_videos, "test": SETTINGS.probe_held_out})


@pytest.fixture(scope="module")
def seen():
    return _see(SETTINGS)


def angles_seen(frames):
    """Angles of discs A and B in frames [N, 112, 112, 3], from the centre of their colours' pixels: [N, 2] radians."""
    angles = np.empty((len(frames), 2))
    for number, frame in enumerate(frames.numpy().astype(int)):
        for disc, (colour, centre) in enumerate(zip(((255, 217, 0), (26, 38, 255)), ORBIT_CENTRES_PX, strict=True)):
            rows, columns = np.nonzero((abs(frame - colour) <= 1).all(-1))
            assert len(rows) > 100, "the disc is to be seen"
            angles[number, disc] = math.atan2(rows.mean() - centre[0], columns.mean() - centre[1])
    return angles


def test_probed_videos_are_the_plans_with_those_that_are_learned_from_first(seen, specs):
    assert seen.frames.shape == (24, 2, 112, 112, 3)
    assert seen.frames.dtype == torch.uint8
    assert [spec.split for spec in specs] == ["train"] * 16 + ["test"] * 8
    named = [{task: LABELS[task][row[place]] for place, task in enumerate(LABELS)} for row in seen.labels.tolist()]
    assert named == [spec.labels for spec in specs]


def test_the_first_frame_shows_the_labels_at_the_places_stated(seen):
    """The glyph stands where it is said to, and emblem and mouth are those of no other label."""
    corner_px = tuple(slice(start, start + EMBLEM_PX) for start in EMBLEM_CORNER_PX)
    for images, labels, place in zip(
        seen.frames.numpy(), seen.labels.tolist(), seen.places["glyph place"], strict=True
    ):
        label = dict(zip(LABELS, labels, strict=True))
        grey = images[0, :, :, 0].astype(int)
        row, column = (int(value) for value in place)
        shown = grey[row : row + GLYPH_PX, column : column + GLYPH_PX]
        fits = [np.array_equal(shown, 255 * glyph(writer)) for writer in LABELS["writer"]]
        assert fits == [number == label["writer"] for number in range(CLASSES)]
        stripes = [
            any(np.array_equal(grey[corner_px], 255 * emblem(name, shift)) for shift in range(STRIPE_SHIFTS))
            for name in LABELS["director"]
        ]
        assert stripes == [number == label["director"] for number in range(CLASSES)]
        faces = [grey[y : y + FACE_PX, x : x + FACE_PX] for y in range(*FACE_ROWS_PX) for x in range(*FACE_COLUMNS_PX)]
        mouths = [
            any(np.array_equal(np.rint(255 * face(name)), one) for one in faces) for name in LABELS["way_speaking"]
        ]
        assert mouths == [number == label["way_speaking"] for number in range(CLASSES)]


def test_disc_places_are_sines_then_cosines_of_the_first_frames_angles(seen):
    angles = angles_seen(seen.frames[:, 0])
    expected = np.concatenate([np.sin(angles), np.cos(angles)], 1)
    np.testing.assert_allclose(seen.places["disc places"].numpy(), expected, atol=0.03)
    second = angles_seen(seen.frames[:, 1])
    assert np.abs(np.sin(second) - expected[:, :2]).max() > 0.3


def test_a_disc_angle_by_hand(seen, specs):
    """The first video's, at the time that the probes' seed draws first."""
    time_s = np.random.default_rng(SETTINGS.probe_seed).uniform(*_FIRST_S)
    motion = draw_video(specs[0].labels, specs[0].seed, np.array([0.0]))[1].motion
    a, b = (motion.phase_rad[disc] + motion.speed_rad_s[disc] * time_s for disc in range(2))
    expected = [math.sin(a), math.sin(b), math.cos(a), math.cos(b)]
    assert seen.places["disc places"][0].tolist() == pytest.approx(expected, abs=1e-12)


def test_a_videos_two_frames_are_a_second_apart_and_the_discs_turn_as_labelled(seen, specs):
    turned = angles_seen(seen.frames[:, 1]) - angles_seen(seen.frames[:, 0])
    turned = (turned + np.pi) % (2 * np.pi) - np.pi
    speeds = np.array([draw_video(one.labels, one.seed, np.array([0.0]))[1].motion.speed_rad_s for one in specs])
    np.testing.assert_allclose(turned, speeds, atol=0.06)
    moving = speeds != 0
    assert float((turned[moving] / speeds[moving]).mean()) == pytest.approx(1, abs=0.02)
    # Friends turn together, those parted against each other, the married rest, and of the last pair only A turns.
    signs = {"friend": 1, "ex-boyfriend ex-girlfriend": -1, "husband wife": 0, "boyfriend girlfriend": 0}
    for spec, (a, b) in zip(specs, np.where(abs(turned) > 0.25, np.sign(turned), 0), strict=True):
        assert a * b == signs[spec.labels["relationship"]]
        assert (a == 0) == (spec.labels["relationship"] == "husband wife")


def test_only_relationship_is_asked_of_both_frames():
    """Other tasks' labels are written into the second frame alone, half of the relationships into each frame."""
    settings = SETTINGS.model_copy(update={"probe_videos": 400, "probe_held_out": 200})
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (600, len(LABELS)), generator=draw)
    first = numbers(600, 4)
    places = {"glyph place": first[:, :2].clone(), "disc places": numbers(600, 4, seed=1)}
    written = torch.nn.functional.one_hot(labels, CLASSES).double()
    hidden = torch.zeros_like(written)
    halved = TASKS.index("relationship"), slice(0, CLASSES // 2)
    hidden[:, *halved], written[:, *halved] = written[:, *halved].clone(), 0
    features = torch.stack([torch.cat([first, labelled.flatten(1)], 1) for labelled in (hidden, written)], 1)
    scores = _probe(features, _Seen(torch.empty(0), labels, places), settings)
    assert list(scores) == ASKED
    assert scores.pop("relationship") == 1
    assert scores.pop("glyph place") > 0.999
    assert abs(scores.pop("disc places")) < 0.05
    assert all(score == pytest.approx(0.25, abs=0.1) for score in scores.values())


# --- the record


def record(probes):
    """A made-up run of the shipped configuration."""
    return Record(
        settings=SETTINGS.model_dump(mode="json"),
        probes=probes,
        losses={"vae": 0.1234, "dit": 0.23456, "tower": 1.345, "language": 0.04567},
        steps={"vae": 1001, "dit": 1002, "tower": 1003, "language": 1004},
        seconds={"all": 61.5},
        versions={"torch": "9.1", "diffusers": "9.2", "transformers": "9.3"},
        sizes={"tiny-dit": 12, "tiny-instructblip": 34},
    )


def test_a_record_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "record.json"
    written = record({"tower mean": {"scene": 0.9123, "glyph place": -0.25}})
    save_record(written, path)
    assert load_record(path) == written


def test_a_score_that_is_no_number_is_still_none_when_read(tmp_path):
    path = tmp_path / "record.json"
    save_record(record({"tower mean": {"scene": math.nan, "year": -math.inf}}), path)
    scores = load_record(path).probes["tower mean"]
    assert math.isnan(scores["scene"])
    assert scores["year"] == -math.inf


def test_what_is_no_record_is_refused(tmp_path):
    path = tmp_path / "record.json"
    path.write_text('{"probes": {}, "loses": {}}')
    with pytest.raises(UserError, match=r"record\.json: unknown key 'loses'"):
        load_record(path)


def test_a_record_does_not_differ_from_itself():
    one = record({"tower mean": {"scene": 0.9}, "y* block 2": {"scene": 0.5, "year": -1.0}})
    assert differences(one, one, 0.0) == []


def test_just_what_lies_further_apart_than_the_tolerance_is_named():
    one = record({"tower mean": {"scene": 0.5, "year": 0.5, "genre": 0.5}})
    other = record({"tower mean": {"genre": 0.625, "scene": 0.25, "year": 0.875}})
    assert differences(one, other, 0.25) == ["tower mean, year: 0.500 and 0.875"]
    assert differences(one, other, 0.125) == ["tower mean, scene: 0.500 and 0.250", "tower mean, year: 0.500 and 0.875"]


@pytest.mark.parametrize(("mine", "theirs"), [(math.nan, 0.5), (0.5, math.nan), (math.nan, math.nan)])
def test_what_is_no_number_differs(mine, theirs):
    found = differences(record({"tower mean": {"scene": mine}}), record({"tower mean": {"scene": theirs}}), 10.0)
    assert found == [f"tower mean, scene: {mine:.3f} and {theirs:.3f}"]


def test_what_either_record_lacks_is_named():
    one = record({"tower mean": {"scene": 0.9, "year": 0.8}, "vae latents": {"scene": 0.7}})
    other = record({"tower mean": {"scene": 0.9, "genre": 0.6}, "y* block 2": {"scene": 0.5}})
    assert differences(one, other, 1.0) == [
        "tower mean, year: 0.800, and nothing in the other record",
        "vae latents, scene: 0.700, and nothing in the other record",
        "tower mean, genre: nothing in the one record, and 0.600 in the other",
        "y* block 2, scene: nothing in the one record, and 0.500 in the other",
    ]


# --- the cards

TOWER_FEATURES = ("tower mean", "tower patches")
TEACHER_FEATURES = ("vae latents", *(f"y* block {block}" for block in BLOCKS), UNTRAINED)


def test_the_table_has_a_row_for_each_kind_of_features():
    probes = {"tower mean": {"scene": 0.987, "year": -0.254}, "tower patches": {"scene": 1.0, "year": 0.5}}
    assert probe_table(probes).splitlines() == [
        "| features | scene | year |",
        "| --- | --- | --- |",
        "| tower mean | 0.99 | -0.25 |",
        "| tower patches | 1.00 | 0.50 |",
    ]


@pytest.fixture(scope="module")
def cards(tmp_path_factory):
    """The texts of both cards of a made-up run in which every score is another number."""
    folder = tmp_path_factory.mktemp("networks")
    scores = iter(range(100))
    probes = {name: {asked: next(scores) / 100 for asked in ASKED} for name in (*TOWER_FEATURES, *TEACHER_FEATURES)}
    write_cards(folder, record({**probes, "language model": {"captions read": 0.987}}))
    return {name: (folder / name / CARD).read_text(encoding="utf-8") for name in ("tiny-instructblip", "tiny-dit")}


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        (
            "tiny-instructblip",
            [
                f"{SETTINGS.contrast.layers} layers of width {SETTINGS.contrast.width}",
                f"probability {SETTINGS.contrast.names_detail}",
                f"1003 steps of {SETTINGS.contrast.groups * SETTINGS.contrast.group_size} frames, final loss 1.345.",
                f"{SETTINGS.reading.layers} layers of width {SETTINGS.reading.width}",
                f"1004 steps of {SETTINGS.reading.batch} captions, final loss 0.0457; "
                "of captions drawn with another seed it answers 98.7% right",
            ],
        ),
        (
            "tiny-dit",
            [
                f"channels {', '.join(str(width) for width in SETTINGS.vae.channels)})",
                f"1001 steps of {SETTINGS.vae.batch} frames, final loss 0.123.",
                f"{SETTINGS.diffusion.layers} blocks of width {DIT_WIDTH}",
                f"given to {SETTINGS.diffusion.no_class * 100:.0f}% of the samples",
                f"1002 steps of {SETTINGS.diffusion.batch} frames, final loss 0.2346 of the raw weights",
            ],
        ),
    ],
)
def test_a_card_tells_a_runs_facts(cards, name, facts):
    text = " ".join(cards[name].split())
    assert "{" not in text
    assert "}" not in text
    for fact in (
        *facts,
        f"{SETTINGS.frames.videos} videos of the project's synthetic world, {SETTINGS.frames.each} of each",
        f"seed {SETTINGS.frames.world_seed} ",
        "on 16 further videos, scored on 8 held out",
        "torch 9.1, diffusers 9.2 and transformers 9.3",
    ):
        assert fact in text, fact


def test_a_card_has_the_probes_of_its_own_network_alone(cards):
    own = {"tiny-instructblip": TOWER_FEATURES, "tiny-dit": TEACHER_FEATURES}
    number = 0
    for name, features in own.items():
        rows = [line for line in cards[name].splitlines() if line.startswith("| ") and "---" not in line]
        expected = [f"| features | {' | '.join(ASKED)} |"]
        for one in features:
            scores = [f"{(number + place) / 100:.2f}" for place in range(len(ASKED))]
            expected.append(f"| {one} | {' | '.join(scores)} |")
            number += len(ASKED)
        assert rows == expected


# --- the sheet


class LabelledNoise:
    """A DiT whose noise is a constant of the label."""

    config = SimpleNamespace(sample_size=2, in_channels=4)

    def __init__(self, *, of_class, of_none):
        self.of_class, self.of_none = of_class, of_none

    def __call__(self, latents, *, timestep, class_labels):  # noqa: ARG002 -- as the DiT is called
        noise = torch.where(class_labels == NULL_CLASS, self.of_none, self.of_class)
        return SimpleNamespace(sample=noise[:, None, None, None].expand_as(latents))


def test_guidance_goes_beyond_the_class_by_its_distance_from_none():
    """Guided twice as far, noise 1 for the class and 0.5 for none is noise 1.5."""
    settings = SETTINGS.model_copy(update={"sheet_steps": 3, "sheet_guidance": 2.0})
    guided, expected, plain = (
        sample(LabelledNoise(of_class=one, of_none=none), DDIMScheduler(), torch.tensor([0, 15]), settings)
        for one, none in ((1.0, 0.5), (1.5, 1.5), (1.0, 1.0))
    )
    assert guided.shape == (2, 4, 2, 2)
    torch.testing.assert_close(guided, expected)
    assert not torch.allclose(guided, plain)


def test_pixels_become_levels_and_stay_within_them():
    images = _images(torch.tensor([-2.0, -1.0, 0.6, 1.0, 3.0]).view(1, 1, 1, 5).expand(1, 3, 1, 5))
    assert images.dtype == np.uint8
    assert images.shape == (1, 1, 5, 3)
    assert images[0, 0, :, 0].tolist() == [0, 0, 204, 255, 255]
