"""What `data.prompts` and `data.jitter` change: samples, plans and commands, and never the cache's fingerprint."""

import json

import pytest

from pipeline import locations
from pipeline.config import dump_yaml, resolve
from stages.errors import UserError
from stages.extraction import feature_fields
from stages.frame_plan import plan_frames

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
    asked = [locations.manifest_of(config).samples[0].prompt_text for config in (plain, paper)]
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
