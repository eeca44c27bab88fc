"""The doctor against real folders: what is there, what is missing, what to do, and that nothing stops it."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from pipeline.commands import doctor
from pipeline.doctor.machine import check_versions
from pipeline.settings.config import resolve
from stages.cache.feature_cache import FeatureCache
from stages.cache.fingerprint import Fingerprint
from stages.frozen.identity import feature_fields
from stages.weights.repository import Repository
from tests.video_files import write_video

VIDEOS = ["v1", "v2", "v3"]
FRAME_TIMES_S = np.array([0.0, 1.0])


def make_dataset(folder: Path, *, present=VIDEOS, expected_samples=3, download="Ask the author of the films.") -> Path:
    """A card with one question about each video, and empty files in the place of the videos."""
    card = {
        "name": "films",
        "title": "Three films",
        "annotations": {"format": "jsonl", "file": "samples.jsonl"},
        "tasks": {"scene": {"labels": ["office", "school"]}},
        "frame_rule": {"kind": "uniform", "num_frames": 2, "index_fps": 1},
        "expected": {"scene": {"train": {"videos": 3, "samples": expected_samples}}},
        "download": download,
    }
    path = folder / "films.yaml"
    path.write_text(yaml.safe_dump(card), encoding="utf-8")
    lines = [
        {"video": video, "duration_s": 2.0, "task": "scene", "question": "where?", "answer": "office", "split": "train"}
        for video in VIDEOS
    ]
    (folder / "annotations").mkdir()
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    (folder / "annotations" / "samples.jsonl").write_text(text, encoding="utf-8")
    (folder / "videos").mkdir()
    for video in present:
        (folder / "videos" / f"{video}.mp4").touch()
    return path


def resolved(folder: Path, *overrides: str):
    options = {
        "data.dataset": str(folder / "films.yaml"),
        "data.videos": str(folder / "videos"),
        "data.annotations": str(folder / "annotations"),
        "cache.root": str(folder / "cache"),
        "run.folder": str(folder / "runs"),
    }
    return resolve(preset="tiny", options=options, overrides=overrides)


def diagnose(settings, capsys, *, quick=True) -> dict[str, dict]:
    """Findings by "section/item"."""
    doctor.run(settings, as_json=True, quick=quick)
    findings = json.loads(capsys.readouterr().out)
    assert all((finding["fix"] is None) == (finding["status"] == "ok") for finding in findings)
    return {f"{finding['section']}/{finding['item']}": finding for finding in findings}


def make_cache(settings, root: Path, videos=VIDEOS) -> FeatureCache:
    fields = {**feature_fields(settings.config), "storage": "float16"}
    cache = FeatureCache.create_or_open(root, Fingerprint(fields=fields))
    for video in videos:
        features, targets = np.zeros((2, 3, 4), np.float16), np.zeros((2, 5), np.float32)
        cache.write_video(video, times_s=FRAME_TIMES_S, features=features, targets=targets)
    return cache


def write_weights(path: Path) -> Path:
    """A file of one tensor, in the form that its name tells of."""
    tensors = {"a": torch.zeros(300)}
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)
    return path


def test_a_complete_data_set_is_ok(tmp_path, capsys):
    make_dataset(tmp_path)
    found = diagnose(resolved(tmp_path), capsys)
    assert found["data/annotations"]["status"] == "ok"
    assert found["data/samples"]["detail"] == "3 train about 3 videos"
    assert found["data/videos"]["detail"].startswith("3 of 3 are in ")
    assert found["versions/torch"]["status"] == "ok"
    assert found["devices/memory"]["status"] == "ok"
    assert found["disk/cache"]["detail"].endswith(f"GiB free for {tmp_path / 'cache'}")
    assert not (tmp_path / "cache").exists()


def test_missing_folders_are_answered_with_the_cards_advice(tmp_path, capsys):
    make_dataset(tmp_path)
    found = diagnose(resolved(tmp_path, "data.videos=nowhere", "data.annotations=neither"), capsys)
    for item, name in (("annotations", "neither"), ("videos", "nowhere")):
        assert found[f"data/{item}"]["status"] == "missing"
        assert found[f"data/{item}"]["detail"] == f"no folder {name}"
        assert "Ask the author of the films." in found[f"data/{item}"]["fix"]
    assert "data.videos" in found["data/videos"]["fix"]
    assert "data/samples" not in found


def test_a_missing_annotation_file_is_named(tmp_path, capsys):
    make_dataset(tmp_path)
    (tmp_path / "annotations" / "samples.jsonl").unlink()
    found = diagnose(resolved(tmp_path), capsys)
    assert found["data/annotations"]["detail"] == f"no file {tmp_path / 'annotations' / 'samples.jsonl'}"


def test_missing_videos_are_counted_and_named(tmp_path, capsys):
    make_dataset(tmp_path, present=["v1", "v3"])
    videos = diagnose(resolved(tmp_path), capsys)["data/videos"]
    assert videos["status"] == "missing"
    assert videos["detail"].startswith("2 of 3 are in ")
    assert "v2" in videos["detail"].partition("missing")[2]
    assert "v1" not in videos["detail"].partition("missing")[2]
    (tmp_path / "videos" / "v2.rar").touch()
    assert "v2.mp4 (v2.rar is there)" in diagnose(resolved(tmp_path), capsys)["data/videos"]["detail"]


def test_a_third_of_the_videos_missing_is_counted_by_split_and_listed_in_full(tmp_path, capsys):
    """Twelve are missing, five are named, and --json has them all; the samples they take away are counted."""
    make_dataset(tmp_path)
    lines = [
        {
            **{"video": f"w{number:02}", "duration_s": 2.0, "task": "scene", "question": "where?", "answer": "office"},
            "split": ("train", "train", "test")[number % 3],
        }
        for number in range(36)
    ]
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    (tmp_path / "annotations" / "samples.jsonl").write_text(text, encoding="utf-8")
    for number in range(36):
        if number % 3:
            (tmp_path / "videos" / f"w{number:02}.mp4").touch()
    found = diagnose(resolved(tmp_path), capsys)
    videos, missing = found["data/videos"], [f"w{number:02}.mp4" for number in range(0, 36, 3)]
    assert videos["status"] == "missing"
    assert videos["names"] == missing
    assert videos["detail"].endswith(
        f"missing 12, with 12 train samples: {', '.join(missing[:5])}, and 7 more (all with --json)"
    )


def test_files_that_no_annotation_names_are_listed(tmp_path, capsys):
    make_dataset(tmp_path, present=["v1", "v3"])
    (tmp_path / "videos" / "more").mkdir()
    for name in ("holiday.mp4", "more/v2 final.mp4", ".hidden"):
        (tmp_path / "videos" / name).touch()
    extra = diagnose(resolved(tmp_path), capsys)["data/extra files"]
    assert (extra["status"], extra["names"]) == ("problem", ["holiday.mp4", "more/v2 final.mp4"])
    prepare = ["--dataset", str(tmp_path / "films.yaml"), "--from", str(tmp_path / "videos"), "--to", str(tmp_path)]
    assert f"`pipeline data prepare {' '.join(prepare)}`" in extra["fix"]
    (tmp_path / "videos" / "v2.mp4").touch()
    assert diagnose(resolved(tmp_path), capsys)["data/extra files"]["status"] == "ok", "nothing is missing"


def test_annotations_among_the_videos_are_no_extra_files(tmp_path, capsys):
    make_dataset(tmp_path)
    for name in ("samples.jsonl", "notes.txt", "other.mp4"):
        (tmp_path / "videos" / name).write_bytes((tmp_path / "annotations" / "samples.jsonl").read_bytes())
    settings = resolved(tmp_path, f"data.annotations={tmp_path / 'videos'}")
    assert diagnose(settings, capsys)["data/extra files"]["names"] == ["other.mp4"]


def test_videos_of_other_tasks_are_no_extra_files(tmp_path, capsys):
    path = make_dataset(tmp_path)
    card = yaml.safe_load(path.read_text())
    card["tasks"]["year"] = {"labels": ["1", "2"]}
    path.write_text(yaml.safe_dump(card))
    line = {"video": "v9", "duration_s": 2.0, "task": "year", "question": "?", "answer": "1", "split": "test"}
    with (tmp_path / "annotations" / "samples.jsonl").open("a") as lines:
        lines.write(f"{json.dumps(line)}\n")
    (tmp_path / "videos" / "v9.mp4").touch()
    assert "data/extra files" not in diagnose(resolved(tmp_path, "data.task=scene"), capsys)


def test_videos_of_another_length_are_found_unless_it_should_be_quick(tmp_path, capsys):
    make_dataset(tmp_path, present=[])
    for name, frames in (("v1", 48), ("v2", 12), ("v3", 96)):
        write_video(tmp_path / "videos" / f"{name}.mp4", count=frames, height=32, width=48)
    durations = diagnose(resolved(tmp_path), capsys, quick=False)["data/durations"]
    assert durations["status"] == "problem"
    assert durations["names"] == ["v2 (0.5 s, annotated 2 s)", "v3 (4.0 s, annotated 2 s)"]
    assert "data/durations" not in diagnose(resolved(tmp_path), capsys, quick=True)


def test_a_video_that_cannot_be_read_is_named_with_the_reason(tmp_path, capsys):
    make_dataset(tmp_path)
    durations = diagnose(resolved(tmp_path), capsys, quick=False)["data/durations"]
    assert durations["names"][0] == "v1 (the file is empty (0 bytes))"


def test_annotated_videos_without_a_duration_are_listed(tmp_path, capsys):
    folder = tmp_path / "annotations" / "scene"
    folder.mkdir(parents=True)
    (tmp_path / "videos").mkdir()
    rows = "class_id class_name youtube_id imdb_id\n0 office v1 tt1\n0 office v2 tt1\n"
    (folder / "train.csv").write_text(rows)
    (tmp_path / "annotations" / "lvu_durations.csv").write_text("videoid,duration\nv1,120\n")
    found = diagnose(resolved(tmp_path, "data.dataset=lvu"), capsys)
    assert found["data/left out"]["names"] == ["v2"]
    train = found["data/annotations train"]
    assert train["status"] == "missing"
    assert len(train["names"]) == 6, "the other tasks' files"


def test_counts_that_are_not_the_published_ones_are_a_problem(tmp_path, capsys):
    make_dataset(tmp_path, expected_samples=4)
    samples = diagnose(resolved(tmp_path), capsys)["data/samples"]
    assert samples["status"] == "problem"
    assert samples["detail"] == "scene train: 3 videos and 3 samples, published 3 and 4"


def test_a_broken_annotation_file_becomes_a_line_and_the_other_checks_go_on(tmp_path, capsys):
    make_dataset(tmp_path)
    (tmp_path / "annotations" / "samples.jsonl").write_text("{broken\n", encoding="utf-8")
    found = diagnose(resolved(tmp_path), capsys)
    assert found["data/check"]["status"] == "problem"
    assert "samples.jsonl:1" in found["data/check"]["detail"]
    assert found["cache/cache"]["status"] == "missing"


def test_without_a_cache_the_extract_command_is_given(tmp_path, capsys):
    make_dataset(tmp_path)
    cache = diagnose(resolved(tmp_path), capsys)["cache/cache"]
    assert cache["status"] == "missing"
    assert "`pipeline extract --dataset " in cache["fix"]


def test_a_full_cache_leads_to_training(tmp_path, capsys):
    make_dataset(tmp_path)
    settings = resolved(tmp_path)
    make_cache(settings, tmp_path / "cache")
    found = diagnose(settings, capsys)
    assert found["cache/fingerprint"]["status"] == "ok"
    assert found["cache/videos"]["detail"] == "3 of 3 done, 0 failed, 0 pending"
    assert found["cache/next"]["detail"].startswith("pipeline train --dataset ")


def test_pending_and_failed_videos_lead_to_extraction(tmp_path, capsys):
    make_dataset(tmp_path)
    settings = resolved(tmp_path)
    cache = make_cache(settings, tmp_path / "cache", ["v1"])
    with cache.ledger.writer() as ledger:
        ledger.failed("v2", reason="no such file", attempts=1)
    pending = diagnose(settings, capsys)["cache/videos"]
    assert (pending["status"], pending["detail"]) == ("missing", "1 of 3 done, 1 failed, 1 pending")
    make_cache(settings, tmp_path / "cache", ["v3"])
    failed = diagnose(settings, capsys)["cache/videos"]
    assert failed["status"] == "problem"
    assert "v2: no such file" in failed["detail"]
    assert "--retry-failed" in failed["fix"]


def test_a_cache_of_another_network_is_a_problem_that_names_the_field(tmp_path, capsys):
    make_dataset(tmp_path)
    make_cache(resolved(tmp_path, "teacher.block=3"), tmp_path / "cache")
    fingerprint = diagnose(resolved(tmp_path), capsys)["cache/fingerprint"]
    assert fingerprint["status"] == "problem"
    assert "teacher.block" in fingerprint["detail"]


def test_a_folder_of_weights_must_be_complete(tmp_path, capsys):
    make_dataset(tmp_path)
    teacher = tmp_path / "dit"
    for component in ("transformer", "vae"):
        (teacher / component).mkdir(parents=True)
        (teacher / component / "config.json").write_text("{}")
    index = {"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}
    (teacher / "transformer" / "x.safetensors.index.json").write_text(json.dumps(index))
    write_weights(teacher / "transformer" / "part-1.safetensors")
    settings = resolved(tmp_path, f"teacher.source={teacher}")
    incomplete = diagnose(settings, capsys)["weights/teacher.source"]
    assert incomplete["status"] == "problem"
    assert incomplete["detail"].endswith("without transformer/part-2.safetensors")
    write_weights(teacher / "transformer" / "part-2.safetensors")
    assert diagnose(settings, capsys)["weights/teacher.source"]["detail"].endswith("without weights in vae/")
    write_weights(teacher / "vae" / "model.safetensors")
    assert diagnose(settings, capsys)["weights/teacher.source"]["status"] == "ok"


def test_a_teacher_of_another_family_needs_other_files(tmp_path, capsys):
    make_dataset(tmp_path)
    dino = tmp_path / "dino"
    dino.mkdir()
    (dino / "config.json").write_text(json.dumps({"model_type": "dinov2"}))
    settings = resolved(tmp_path, "teacher.kind=dinov2", f"teacher.source={dino}")
    assert diagnose(settings, capsys)["weights/teacher.source"]["detail"].endswith("without weights in dino/")
    write_weights(dino / "model.safetensors")
    found = diagnose(settings, capsys)
    assert found["weights/teacher.source"]["status"] == "ok"
    assert "weights/teacher.vae_source" not in found
    other = diagnose(resolved(tmp_path, f"teacher.source={dino}"), capsys)["weights/teacher.source"]
    assert (other["status"], other["detail"]) == ("problem", f"{dino}: not of kind dit")
    assert other["fix"].startswith("set teacher.kind=dinov2,")


def test_a_vision_tower_as_the_teacher_needs_its_own_shards_alone(tmp_path, capsys):
    make_dataset(tmp_path)
    clip = tmp_path / "clip"
    clip.mkdir()
    (clip / "config.json").write_text(json.dumps({"model_type": "clip"}))
    index = {"weight_map": {"text_model.a": "part-1.safetensors", "vision_model.a": "part-2.safetensors"}}
    (clip / "model.safetensors.index.json").write_text(json.dumps(index))
    settings = resolved(tmp_path, "teacher.kind=tower", f"teacher.source={clip}")
    assert diagnose(settings, capsys)["weights/teacher.source"]["detail"].endswith("without part-2.safetensors")
    write_weights(clip / "part-2.safetensors")
    assert diagnose(settings, capsys)["weights/teacher.source"]["status"] == "ok"


def test_an_original_dit_file_needs_a_vae_beside_it(tmp_path, capsys):
    make_dataset(tmp_path)
    file, vae = tmp_path / "DiT.pt", tmp_path / "vae"
    settings = resolved(tmp_path, f"teacher.source={file}", f"teacher.vae_source={vae}")
    missing = diagnose(settings, capsys)
    assert missing["weights/teacher.source"]["detail"].endswith("no such file")
    assert missing["weights/teacher.vae_source"]["status"] == "missing"
    write_weights(file)
    vae.mkdir()
    (vae / "config.json").write_text("{}")
    write_weights(vae / "diffusion_pytorch_model.safetensors")
    found = diagnose(settings, capsys)
    assert {found[f"weights/teacher.{name}"]["status"] for name in ("source", "vae_source")} == {"ok"}


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'9' * 64}\nsize 499723\n".encode()
FILES = (
    "config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "qformer_tokenizer/tokenizer.json",
    "model.safetensors",
)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["pointer", "cut", "empty"])
def test_a_pointer_or_a_cut_file_is_not_ok(tmp_path, capsys, name, damage):
    make_dataset(tmp_path)
    tiny = Repository("bundled:tiny-instructblip").folder
    folder = shutil.copytree(tiny, tmp_path / "lmm")
    settings = resolved(tmp_path, *(f"{part}.source={folder}" for part in ("encoder", "qformer", "language")))
    parts = ["encoder", "qformer", "language"]
    whole = diagnose(settings, capsys)
    assert {whole[f"weights/{part}.source"]["status"] for part in parts} == {"ok"}
    content = (folder / name).read_bytes()
    (folder / name).write_bytes({"pointer": POINTER, "cut": content[: len(content) // 2], "empty": b""}[damage])
    found = diagnose(settings, capsys)
    wrong = [found[f"weights/{part}.source"] for part in parts if found[f"weights/{part}.source"]["status"] != "ok"]
    assert wrong
    words = {"pointer": "a git-lfs pointer that stands for 499,723 bytes", "cut": "", "empty": "the file is empty"}
    assert all(f"{folder / name}: " in one["detail"] and words[damage] in one["detail"] for one in wrong)


def test_a_cut_original_file_is_not_ok_and_its_vae_is_looked_at_all_the_same(tmp_path, capsys):
    make_dataset(tmp_path)
    file, vae = write_weights(tmp_path / "DiT.pt"), tmp_path / "vae"
    file.write_bytes(file.read_bytes()[:-30])
    settings = resolved(tmp_path, f"teacher.source={file}", f"teacher.vae_source={vae}")
    found = diagnose(settings, capsys)
    assert "cut short: the index at its end is missing" in found["weights/teacher.source"]["detail"]
    assert found["weights/teacher.vae_source"]["status"] == "missing"


def test_a_source_that_cannot_be_a_hub_id_is_told_apart(tmp_path, capsys):
    make_dataset(tmp_path)
    weights = diagnose(resolved(tmp_path, "encoder.source=/no/such/folder"), capsys)["weights/encoder.source"]
    assert "not a hub id" in weights["detail"]
    assert "encoder.source" in weights["fix"]


def test_hub_weights_are_looked_for_in_the_hub_cache_and_never_fetched(tmp_path):
    make_dataset(tmp_path)
    snapshot = tmp_path / "hub" / "models--somebody--blip" / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("c0ffee")
    (snapshot / "config.json").write_text("{}")
    index = {"weight_map": {"vision_model.x": "1.safetensors", "language_model.y": "2.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    write_weights(snapshot / "1.safetensors")
    arguments = ["encoder.source=somebody/blip", "language.source=somebody/blip", "teacher.source=nobody/dit"]
    # The hub's address leads nowhere, so a download would fail instead of passing unseen.
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    options = {"data.dataset": str(tmp_path / "films.yaml")}
    code = f"""if True:
        from pipeline.commands import doctor
        from pipeline.settings.config import resolve
        doctor.run(resolve(preset="tiny", options={options!r}, overrides={arguments!r}), as_json=True, quick=True)
    """
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    weights = {finding["item"]: finding for finding in json.loads(done.stdout) if finding["section"] == "weights"}
    assert weights["encoder.source"]["status"] == "ok", "the encoder needs the shard of the vision tower alone"
    assert weights["language.source"]["detail"].endswith("without tokenizer_config.json")
    assert weights["teacher.source"]["status"] == "missing"
    assert weights["teacher.source"]["fix"] == "run `hf download nobody/dit`"


def test_every_dependency_is_looked_up_and_nothing_heavy_is_imported():
    code = """if True:
        import sys
        from pipeline.doctor.machine import check_versions
        from pipeline.settings.config import PipelineConfig
        items = [finding.item for finding in check_versions(PipelineConfig())]
        assert {"python", "diff-lmm", "torch", "diffusers", "ray", "zarr", "av", "numpy"} <= set(items), items
        assert "pytest" not in items, "what only developers need is not asked for"
        assert not {"torch", "ray", "av", "zarr", "transformers"} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_package_that_is_gone_or_too_old_is_flagged(tmp_path, monkeypatch):
    """A folder with other metadata, found first, stands for another installation."""
    for name, version in (("zarr", "3.0.0"), ("diff_lmm", "0.1.0")):
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        requires = "Requires-Dist: zarr>=3.1\nRequires-Dist: no-such-package>=2\n" if name == "diff_lmm" else ""
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}"
        (folder / "METADATA").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    found = {finding.item: finding for finding in check_versions(resolve(preset="tiny").config)}
    assert (found["zarr"].status, found["zarr"].fix) == ("problem", "run `pip install 'zarr>=3.1'`")
    assert found["no-such-package"].status == "missing"


def test_people_read_the_lines_on_stdout(tmp_path, capsys):
    make_dataset(tmp_path, present=["v1"])
    doctor.run(resolved(tmp_path), as_json=False, quick=True)
    shown = capsys.readouterr()
    assert shown.err == ""
    lines = shown.out.splitlines()
    videos = next(index for index, line in enumerate(lines) if line.startswith("  missing  videos: 1 of 3"))
    assert lines[videos + 1].lstrip().startswith("-> put the video files into ")
    counts = Counter(line.split()[0] for line in lines if line.startswith(("  missing ", "  problem ")))
    shown_counts = {"missing": f"{counts['missing']} missing", "problem": f"{counts['problem']} problems"}
    assert counts["problem"] != 1
    assert lines[-1] == "not in place: " + ", ".join(shown_counts[status] for status in counts)


def test_strict_exits_with_3_where_something_needed_is_missing(tmp_path, pipeline):
    make_dataset(tmp_path, present=["v1"])
    call = ["doctor", "--preset", "tiny", "--dataset", tmp_path / "films.yaml", "--quick"]
    call += ["--annotations", tmp_path / "annotations", "--videos", tmp_path / "videos", "--cache", tmp_path / "cache"]
    pipeline(*call)
    out, _ = pipeline(*call, "--strict", status=3)
    assert "missing  videos: 1 of 3" in out
    found = json.loads(pipeline(*call, "--strict", "--json", status=3)[0])
    assert [one["item"] for one in found if one["status"] != "ok" and one["needed"]] == ["videos"]
    for video in VIDEOS:
        (tmp_path / "videos" / f"{video}.mp4").touch()
    out, _ = pipeline(*call, "--strict")
    assert "missing  cache: none at" in out, "the next command makes it"


def test_strict_does_not_ask_for_published_counts(tmp_path, pipeline):
    make_dataset(tmp_path, expected_samples=4)
    call = ["doctor", "--preset", "tiny", "--dataset", tmp_path / "films.yaml", "--quick"]
    out, _ = pipeline(*call, "--annotations", tmp_path / "annotations", "--videos", tmp_path / "videos", "--strict")
    assert "problem  samples: scene train: 3 videos and 3 samples, published 3 and 4" in out


def test_the_advice_is_made_of_sentences(tmp_path, capsys):
    make_dataset(tmp_path, present=["v1"])
    for settings, advice in (
        (resolved(tmp_path), "to their folder. Ask the author of the films. Without them, extraction counts"),
        (resolved(tmp_path, "data.videos=nowhere"), "to their folder. Ask the author of the films."),
    ):
        assert advice in diagnose(settings, capsys)["data/videos"]["fix"]
    (tmp_path / "plain").mkdir()
    make_dataset(tmp_path / "plain", present=["v1"], download="")
    videos = diagnose(resolved(tmp_path / "plain"), capsys)["data/videos"]
    assert "to their folder. Without them, extraction counts these videos as failed." in videos["fix"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_a_problem(tmp_path, capsys):
    make_dataset(tmp_path)
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    disk = diagnose(resolved(tmp_path, f"cache.root={locked / 'cache'}"), capsys)["disk/cache"]
    assert disk["status"] == "problem"


def test_what_each_preset_downloads_is_named_in_bytes_and_with_its_licence(tmp_path, capsys):
    """Of the InstructBLIP, preset small needs the one file with vision tower and Q-Former."""
    make_dataset(tmp_path)
    found = diagnose(resolved(tmp_path), capsys)
    dit = "3,333,921,308 bytes of facebook/DiT-XL-2-256 (CC-BY-NC-4.0)"
    terms = "of Salesforce/instructblip-vicuna-7b (research only, under LLaMA's terms)"
    assert found["downloads/diff-lmm-7b"]["detail"] == f"{dit}, 31,654,906,880 bytes {terms}"
    qwen = "988,065,536 bytes of Qwen/Qwen2.5-0.5B-Instruct (Apache-2.0)"
    assert found["downloads/small"]["detail"] == f"{dit}, 9,901,296,640 bytes {terms}, {qwen}"
    assert found["downloads/tiny"]["detail"] == "nothing; its networks come with the project"
