"""Scores of a thousand random sets of predictions against a plain computation that shares no code with the project."""

import math

import numpy as np
import pytest

from stages.evaluate.scoring import Prediction, score

KINDS = ("what", "who", None)
RESAMPLES = 40


def random_set(random):
    """One or two tasks of up to nine videos; sometimes ranked, sometimes open, sometimes with few beams."""
    rows, labels, majority = [], {}, {}
    method = "rank" if random.random() < 0.4 else "generate"
    for task in ("one", "two")[: random.integers(1, 3)]:
        names = [f"label {index}" for index in range(random.integers(2, 9))]
        is_open = method == "generate" and random.random() < 0.3
        labels[task] = None if is_open else names
        if random.random() < 0.7:
            majority[task] = names[random.integers(len(names))]
        beams = 5 if random.random() < 0.8 else 3
        several = random.random() < 0.3
        for video in range(random.integers(1, 10)):
            gold = names[random.integers(len(names))]
            for window in range(random.integers(1, 6)):
                if several:
                    gold = names[random.integers(len(names))]
                texts = names if method == "rank" else [*names, "nonsense", "more", "of it", "and on"]
                order = random.permutation(len(texts))
                kept = order if method == "rank" else order[:beams]
                # Quarters, so that ties of sums are frequent and exact.
                scores = sorted((-random.integers(1, 9, len(kept)) / 4).tolist(), reverse=True)
                kind = KINDS[random.integers(3)] if is_open else None
                answers = tuple(texts[k] for k in kept)
                rows.append(
                    Prediction(f"{task}{video}.{window}", f"v{video}", task, "?", gold, answers, tuple(scores), kind)
                )
    return rows, labels, majority, method


def plain_wilson(right, total):
    z = 1.959963984540054
    p = right / total
    middle = (2 * total * p + z * z) / (2 * (total + z * z))
    half = z * math.sqrt(z * z + 4 * total * p * (1 - p)) / (2 * (total + z * z))
    return middle - half, middle + half


def plain_quantile(values, share):
    values = sorted(values)
    place = share * (len(values) - 1)
    below = int(place)
    above = min(below + 1, len(values) - 1)
    return values[below] + (values[above] - values[below]) * (place - below)


def plain_bootstrap(rows, seed):
    names = []
    for one in rows:
        if one.video not in names:
            names.append(one.video)
    if len(names) == 1:
        return None
    draws = np.random.default_rng(seed).multinomial(len(names), [1 / len(names)] * len(names), size=RESAMPLES)
    shares = []
    for drawn in draws.tolist():
        right = total = 0
        for times, name in zip(drawn, names, strict=True):
            for one in rows:
                if one.video == name:
                    total += times
                    right += times if one.answers[0] == one.gold else 0
        shares.append(right / total)
    return plain_quantile(shares, 0.025), plain_quantile(shares, 0.975)


def plain_videos(rows, labels, method):
    """Right by majority and by likelihood; None where videos have several right answers."""
    right = [0, 0]
    names = {one.video for one in rows}
    for name in names:
        mine = [one for one in rows if one.video == name]
        if any(one.gold != mine[0].gold for one in mine):
            return None
        best, best_key = None, None
        for one in mine:
            given = one.answers[0]
            same = [other.log_probability[0] for other in mine if other.answers[0] == given]
            if best_key is None or (len(same), sum(same)) > best_key:
                best, best_key = given, (len(same), sum(same))
        right[0] += best == mine[0].gold
        if method == "rank":
            best, best_mean = None, -math.inf
            for label in labels:
                mean = 0.0
                for one in mine:
                    mean += one.log_probability[one.answers.index(label)] / 4
                if mean > best_mean:
                    best, best_mean = label, mean
            right[1] += best == mine[0].gold
    return len(names), right[0], right[1] if method == "rank" else None


def plain_classes(rows, labels):
    found, recalls, counts = [], [], []
    for label in labels:
        mine = [one for one in rows if one.gold == label]
        right = sum(1 for one in mine if one.answers[0] == label)
        found.append((label, len(mine), right))
        if mine:
            recalls.append(right / len(mine))
        line = [sum(1 for one in mine if one.answers[0] == given) for given in labels]
        counts.append((*line, len(mine) - sum(line)))
    return found, sum(recalls) / len(recalls), tuple(counts)


def check(one, rows, labels, majority, method, seed):
    n = len(rows)
    right = [one.answers[0] == one.gold for one in rows]
    assert (one.n, one.correct, one.top1) == (n, sum(right), sum(right) / n)
    assert one.num_videos == len({row.video for row in rows})
    enough = len(rows[0].answers) >= (6 if method == "rank" else 5)
    assert one.top5 == (sum(1 for row in rows if row.gold in row.answers[:5]) / n if enough else None)
    assert one.ci95 == pytest.approx(plain_wilson(sum(right), n), abs=1e-12)
    over_videos = plain_bootstrap(rows, seed)
    assert one.ci95_videos == (None if over_videos is None else pytest.approx(over_videos, abs=1e-12))
    golds = [row.gold for row in rows]
    assert one.floor == max(golds.count(gold) for gold in golds) / n
    assert one.train_floor == (None if majority is None else golds.count(majority) / n)
    if labels is None:
        assert (one.macro, one.classes, one.confusion, one.no_label) == (None, (), None, None)
    else:
        classes, macro, counts = plain_classes(rows, labels)
        assert [(entry.label, entry.n, entry.correct) for entry in one.classes] == classes
        assert one.macro == pytest.approx(macro, abs=1e-12)
        assert one.confusion.counts == counts
        assert one.no_label == sum(1 for row in rows if row.answers[0] not in labels) / n
    expected, videos = plain_videos(rows, labels, method), one.videos
    assert (videos and (videos.n, videos.correct_majority, videos.correct_likelihood)) == expected
    for kind in ("what", "who"):
        mine = [hit for row, hit in zip(rows, right, strict=True) if row.answer_type == kind]
        found = one.answer_types.get(kind)
        assert (found and (found.n, found.correct)) == ((len(mine), sum(mine)) if mine else None)


def test_a_thousand_random_sets_score_as_a_plain_computation_says():
    random = np.random.default_rng(2025)
    seen = {"votes": 0, "likelihoods": 0, "open": 0, "top5": 0, "single": 0}
    for number in range(1000):
        rows, labels, majority, method = random_set(random)
        found = score(
            rows, split="val", method=method, labels=labels, train_majority=majority, resamples=RESAMPLES, seed=number
        )
        assert list(found) == list(labels)
        for task, one in found.items():
            mine = [row for row in rows if row.task == task]
            check(one, mine, labels[task], majority.get(task), method, number)
            seen["votes"] += one.videos is not None
            seen["likelihoods"] += one.videos is not None and one.videos.correct_likelihood is not None
            seen["open"] += labels[task] is None
            seen["top5"] += one.top5 is not None
            seen["single"] += one.ci95_videos is None
    assert min(seen.values()) > 50, seen
