"""A user's own data set: what the README shows is extracted from it and run, and exported data sets are read again."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from stages.cache.feature_cache import FeatureCache
from stages.data.cards import build_manifest, export_manifest, load_card
from stages.data.frame_plan import plan_frames
from stages.errors import UserError
from tests.conftest import run_pipeline
from tests.video_files import RATE_FPS, write_video

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory):
    """The README's files, with videos as long as it says; and its commands."""
    section = README.read_text(encoding="utf-8").partition("### Your own data set")[2].partition("\n## ")[0]
    blocks = dict(re.findall(r"```(yaml|json|bash)\n(.*?)```", section, re.DOTALL))
    folder = tmp_path_factory.mktemp("kitchen")
    assert blocks["yaml"].startswith("# kitchen.yaml\n")
    (folder / "kitchen.yaml").write_text(blocks["yaml"])
    (folder / "samples.jsonl").write_text(blocks["json"])
    (folder / "clips").mkdir()
    for line in map(json.loads, blocks["json"].splitlines()):
        path = folder / "clips" / f"{line['video']}.mp4"
        write_video(path, count=int(line["duration_s"] * RATE_FPS), height=48, width=64)
    commands = [shlex.split(line, comments=True)[1:] for line in blocks["bash"].splitlines()]
    return folder, {command[0]: command for command in commands}


def test_the_readmes_own_data_set_is_ten_lines_and_in_place(kitchen):
    folder, commands = kitchen
    lines = (folder / "kitchen.yaml").read_text() + (folder / "samples.jsonl").read_text()
    assert len(lines.splitlines()) <= 10
    done = run_pipeline(*commands["doctor"], "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    found = {finding["item"]: finding for finding in json.loads(done.stdout) if finding["section"] == "data"}
    assert {finding["status"] for finding in found.values()} == {"ok"}
    assert found["samples"]["detail"] == "2 train, 1 test about 3 videos"
    assert found["durations"]["detail"] == "3 files are as long as annotated"


UNKNOWN = "warning: the bundled tiny networks know the synthetic videos only;"


def test_the_readmes_own_data_set_goes_all_the_way_to_an_answer(kitchen):
    """Every command as printed, from the plan on; those that use the tiny networks say in one line what they are."""
    folder, commands = kitchen
    planned = run_pipeline(*commands["plan"], "--no-calibrate", "--json", cwd=folder)
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout)["frames"] == 24
    told = {}
    for name in ("extract", "train", "evaluate", "predict"):
        done = run_pipeline(*commands[name], "--json", cwd=folder)
        assert done.returncode == 0, done.stderr
        told[name] = json.loads(done.stdout)
        assert [line.startswith(UNKNOWN) for line in done.stderr.splitlines()].count(True) == 1, done.stderr
        assert "no training sample" not in done.stderr
    assert list(commands) == ["doctor", "plan", *told]
    assert told["extract"]["done"] == 3
    assert told["train"]["run"] == "runs/kitchen"
    assert {method: scores["action"]["n"] for method, scores in told["evaluate"].items()} == {"generate": 1, "rank": 1}
    assert sorted(told["predict"]["answers"]) == ["cut", "stir"]
    cache = FeatureCache.open(folder / "cache")
    manifest = build_manifest(load_card(folder / "kitchen.yaml"), annotations=folder, videos=folder / "clips")
    for sample in manifest.samples:
        frames = cache.read(sample.video, sample.frame_times_s(), tolerance_s=0.0)
        assert frames.features.shape[0] == 8


def test_the_readmes_commands_are_found_once_its_environment_is_activated(tmp_path):
    """What `make demo` sets up lies where README activates it."""
    root = README.parent
    venv = re.search(r"^VENV := (.*)$", (root / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)[1]
    block = README.read_text(encoding="utf-8").partition("## On real data\n\n```bash\n")[2]
    activate = shlex.split(block.splitlines()[0], comments=True)
    assert activate == ["source", f"{venv}/bin/activate"]
    if not (Path(sys.prefix) / "bin" / "activate").is_file():
        pytest.skip("the tests do not run in a virtual environment")
    (tmp_path / venv).symlink_to(sys.prefix)
    found = subprocess.run(
        ["bash", "-c", f"{shlex.join(activate)} && command -v pipeline"],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.stdout == f"{sys.prefix}/bin/pipeline\n", found.stderr


def test_an_exported_data_set_is_the_same_data_set(kitchen, tmp_path):
    folder, _ = kitchen
    options = ["--dataset", folder / "kitchen.yaml", "--annotations", folder]
    done = run_pipeline("data", "export", tmp_path / "plain", *options, "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"card": str(tmp_path / "plain" / "kitchen.yaml"), "videos": 3, "samples": 3}
    first = build_manifest(load_card(folder / "kitchen.yaml"), annotations=folder, videos=None)
    plain = build_manifest(load_card(tmp_path / "plain" / "kitchen.yaml"), annotations=tmp_path / "plain", videos=None)
    assert plain.samples == first.samples
    assert plain.videos == first.videos


def test_an_exported_sample_may_name_its_frames_and_mistakes_have_their_line(kitchen, tmp_path):
    folder, _ = kitchen
    card = load_card(folder / "kitchen.yaml")
    manifest = build_manifest(card, annotations=folder, videos=None)
    exported = load_card(export_manifest(card, manifest, tmp_path))
    samples = tmp_path / "samples.jsonl"
    first, *rest = map(json.loads, samples.read_text().splitlines())
    for key in ("start_s", "end_s", "num_frames", "index_fps"):
        del first[key]
    write_lines(samples, [{**first, "times_s": [0.5, 2.25, 3.0]}, *rest])
    read = build_manifest(exported, annotations=tmp_path, videos=None)
    assert plan_frames(read).times_s["clip1"].tolist() == [0.5, 2.25, 3.0]
    write_lines(samples, [{**first, "times_s": [0.5, 0.25]}, *rest])
    with pytest.raises(UserError, match=rf"{samples}:1: times_s must be sorted"):
        build_manifest(exported, annotations=tmp_path, videos=None)
    write_lines(samples, [{**rest[0], "candidates": ["cut", "pour"]}])
    with pytest.raises(UserError, match=r"has a task or candidates that the card 'kitchen' has not"):
        build_manifest(exported, annotations=tmp_path, videos=None)


def test_an_exported_data_set_can_leave_its_jitter_out(tmp_path):
    card = load_card("msvd_qa")
    asked = {"video": "v_1_2", "frame_length": 40, "question": "who runs?", "answer": "man"}
    (tmp_path / "qa_train.json").write_text(json.dumps({"0000000": asked}))
    manifest = build_manifest(card, annotations=tmp_path, videos=None)
    exported = load_card(export_manifest(card, manifest, tmp_path / "plain"))
    assert build_manifest(exported, annotations=tmp_path / "plain", videos=None).samples == manifest.samples
    still = exported.as_asked(prompts="ma-lmm", jitter=False)
    assert [sample.jitter for sample in build_manifest(still, annotations=tmp_path / "plain", videos=None).samples] == [
        False
    ]


def test_an_export_onto_a_file_is_one_line(kitchen):
    folder, _ = kitchen
    options = ["--dataset", "kitchen.yaml", "--annotations", "."]
    done = run_pipeline("data", "export", "kitchen.yaml", *options, cwd=folder)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: kitchen.yaml: a file is in the place of this folder")


def write_lines(path, records):
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))


def test_downloads_are_prepared_and_then_in_place(tmp_path):
    """A user's whole way: prepare dry, prepare, ask the doctor."""
    downloads = tmp_path / "downloads" / "lvu"
    downloads.mkdir(parents=True)
    clips = {
        name: {"subset": "test", "duration": 2, "num_frames": 22, "scene": "office", "scene_answer": "(a)"}
        for name in ("abcdefghij1", "abcdefghij2", "abcdefghij3")
    }
    (downloads / "test.json").write_text(json.dumps(clips))
    write_video(downloads / "A film [abcdefghij1].mp4", count=2 * RATE_FPS, height=48, width=64)
    write_video(downloads / "abcdefghij2.mkv", count=RATE_FPS // 2, height=48, width=64)
    call = ["data", "prepare", "--dataset", "lvu", "--from", tmp_path / "downloads", "--to", tmp_path / "lvu"]
    dry = run_pipeline(*call, "--dry-run", "--json")
    assert dry.returncode == 0, dry.stderr
    assert json.loads(dry.stdout)["missing_videos"] == ["abcdefghij3"]
    assert not (tmp_path / "lvu").exists()
    done = run_pipeline(*call)
    assert done.returncode == 0, done.stderr
    hint = done.stdout.partition("next: pipeline ")[2].split()
    found = run_pipeline(*hint, "--preset", "tiny", "--json")
    data = {finding["item"]: finding for finding in json.loads(found.stdout) if finding["section"] == "data"}
    assert data["videos"]["names"] == ["abcdefghij3.mp4"]
    assert data["videos"]["detail"].startswith(f"2 of 3 are in {tmp_path / 'lvu' / 'videos'}; missing 1, with 1 test")
    assert data["durations"]["names"] == ["abcdefghij2 (0.5 s, annotated 2 s)"]


@pytest.mark.parametrize("folders", [("lvu/annotations", "lvu/videos"), ("labels", "films")])
def test_the_doctors_command_for_misnamed_videos_mends_the_folder(tmp_path, folders):
    for name in folders:
        (tmp_path / name).mkdir(parents=True)
    annotations, videos = folders
    clip = {"subset": "test", "duration": 2, "num_frames": 22, "scene": "office", "scene_answer": "(a)"}
    (tmp_path / annotations / "test.json").write_text(json.dumps({"abcdefghij1": clip}))
    write_video(tmp_path / videos / "A film [abcdefghij1].mp4", count=2 * RATE_FPS, height=48, width=64)

    def findings(annotations, videos):
        options = ["--dataset", "lvu", "--annotations", annotations, "--videos", videos, "--preset", "tiny"]
        done = run_pipeline("doctor", *options, "--json", cwd=tmp_path)
        return {one["item"]: one for one in json.loads(done.stdout) if one["section"] == "data"}

    fix = findings(*folders)["extra files"]["fix"]
    done = run_pipeline(*shlex.split(fix.split("`")[1])[1:], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    there = folders if annotations.startswith("lvu") else ("data/lvu/annotations", "data/lvu/videos")
    assert findings(*there)["videos"]["status"] == "ok"
