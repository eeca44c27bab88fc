"""What `data.prompts`, `jitter` and `frame_offset` change: samples, plans and commands, never a cache's fingerprint."""

import json

import numpy as np
import pytest

from pipeline.runs.cached_data import cached_samples
from pipeline.settings import locations
from pipeline.settings.config import dump_yaml, resolve
from stages.batches.windows import WindowDataset
from stages.cache import FeatureCache, Fingerprint
from stages.data.cards import build_manifest, export_manifest, load_card
from stages.data.frame_plan import plan_frames
from stages.errors import UserError
from stages.frozen.identity import feature_fields

CLIP = {"subset": "train", "duration": 30, "num_frames": 310, "way_speaking": "teach", "way_speaking_answer": "(d)"}
ASKED = {"video": "v_1_2", "frame_length": 40, "question": "who runs?", "answer": "man"}


@pytest.fixture
def annotations(tmp_path):
    (tmp_path / "train.json").write_text(json.dumps({"v1": CLIP}))
    (tmp_path / "qa_train.json").write_text(json.dumps({"0000000": ASKED}))
    return tmp_path


def config_of(dataset, annotations, *overrides):
    options = {"data.dataset": dataset, "data.annotations": str(annotations)}
    return resolve(preset="tiny", options=options, overrides=overrides).config


def test_the_wording_reaches_samples_and_the_runs_record_and_not_the_fingerprint(annotations):
    plain, paper = (config_of("lvu", annotations, *given) for given in ([], ["data.prompts=paper"]))
    samples = [locations.manifest_of(config).samples[0] for config in (plain, paper)]
    asked = [sample.prompt.replace("{}", sample.question) for sample in samples]
    assert asked == ["what is the way_speaking of the movie?", "what is the speaking style of the movie?"]
    assert "prompts: paper" in dump_yaml(paper)
    assert "speaking style" in locations.card_of(paper).tasks["way_speaking"].prompt
    assert feature_fields(plain, with_teacher=True) == feature_fields(paper, with_teacher=True)
    assert locations.extract_command(paper) == locations.extract_command(plain)


def test_a_wording_that_does_not_exist_is_refused(annotations):
    with pytest.raises(UserError, match=r"data.prompts: .*'ma-lmm' or 'paper'"):
        config_of("lvu", annotations, "data.prompts=llava")
    with pytest.raises(UserError, match=r"data.prompts: data set 'msvd_qa' has no wording of the paper"):
        locations.card_of(config_of("msvd_qa", annotations, "data.prompts=paper"))


def test_without_jitter_only_the_frames_of_evaluation_are_planned_and_the_command_says_so(annotations):
    with_it, without = (config_of("msvd_qa", annotations, *given) for given in ([], ["data.jitter=false"]))
    assert plan_frames(locations.manifest_of(with_it)).num_frames == 40
    assert plan_frames(locations.manifest_of(without)).num_frames == 20
    assert "data.jitter" not in locations.extract_command(with_it)
    assert locations.extract_command(without).endswith("--set data.jitter=false")
    assert feature_fields(with_it, with_teacher=True) == feature_fields(without, with_teacher=True)


def test_an_offset_plans_other_frames_and_the_command_says_so(annotations):
    plain, shifted = (config_of("lvu", annotations, *given) for given in ([], ["data.frame_offset=-1"]))
    (at,), (before,) = (plan_frames(locations.manifest_of(config)).times_s.values() for config in (plain, shifted))
    assert np.array_equal(before[1:], np.rint(10 * at[1:] - 1) / 10)
    assert before[0] == at[0] == 0
    assert locations.card_of(shifted).frame_rule.frame_offset == -1
    assert "frame_offset" not in locations.extract_command(plain)
    assert locations.extract_command(shifted).endswith("--set data.frame_offset=-1")
    assert feature_fields(plain, with_teacher=True) == feature_fields(shifted, with_teacher=True)


def test_one_cache_never_gives_the_frames_of_one_offset_for_those_of_another(annotations, tmp_path):
    plain, shifted = (config_of("lvu", annotations, *given) for given in ([], ["data.frame_offset=-1"]))
    manifests = [locations.manifest_of(config) for config in (plain, shifted)]
    cache = FeatureCache.create_or_open(tmp_path / "cache", Fingerprint(fields={"storage": "float32"}))
    plans = [plan_frames(manifest).times_s for manifest in manifests]

    def extract(times_s):
        """Features that say which second they are of."""
        features = np.broadcast_to(times_s[:, None, None], (len(times_s), 2, 3)).astype(np.float32)
        with cache.ledger.writer() as ledger:
            targets = np.zeros((len(times_s), 5), np.float32)
            record = cache.write_video("v1", times_s=times_s, features=features, targets=targets)
            ledger.done("v1", checksum=record.checksum, attempts=1)

    extract(plans[0]["v1"])
    assert len(cached_samples(cache, manifests[0]).samples) == 1
    with pytest.raises(UserError, match="1 of 1 video is not extracted"):
        cached_samples(cache, manifests[1])
    extract(np.union1d(plans[0]["v1"], plans[1]["v1"]))
    for manifest in manifests:
        (sample,) = cached_samples(cache, manifest).samples
        window = WindowDataset(cache, [sample], tolerance_s=plain.cache.tolerance_s, with_targets=False)[0]
        np.testing.assert_allclose(window.features[:, 0, 0].numpy(), sample.frame_times_s(), atol=1e-5)


def test_an_exported_data_set_keeps_its_offset_and_takes_another(annotations, tmp_path):
    config = config_of("lvu", annotations, "data.frame_offset=-1")
    manifest = locations.manifest_of(config)
    exported = load_card(export_manifest(locations.card_of(config), manifest, tmp_path / "plain"))
    for asked, expected in ((0, -1), (-2, -2)):
        card = exported.as_asked(prompts="ma-lmm", jitter=True, frame_offset=asked)
        read = build_manifest(card, annotations=tmp_path / "plain", videos=None)
        assert {sample.frame_offset for sample in read.samples} == {expected}
