"""Downloads find their places: by name, by id, out of archives, never over what is there."""

import json
import os
import shutil
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pytest

from stages.data.annotations.lengths import HEADER
from stages.data.cards import build_manifest, load_card
from stages.data.downloads import list_downloads
from stages.data.preparation import find_files, put_in_place, unmeasured, write_lengths
from stages.errors import UserError

CLIP = {"subset": "train", "duration": 130, "num_frames": 1598, "scene": "office", "scene_answer": "(a)"}
IDS = ["abcdefghi-1", "_bcdefghi-2", "-cdefghi_-3", "dddddddddd4", "eeeeeeeeee5"]


@pytest.fixture
def downloads(tmp_path):
    """A clone of MA-LMM's repository beside a folder of videos as download programs name them."""
    folder = tmp_path / "downloads"
    for data_set, content in (("lvu", dict.fromkeys(IDS, CLIP)), ("coin", {"x": {"label": 3}})):
        annotations = folder / "MA-LMM" / "data" / data_set / "annotation"
        annotations.mkdir(parents=True)
        (annotations / "train.json").write_text(json.dumps(content))
    videos = folder / "clips" / "2011"
    videos.mkdir(parents=True)
    names = (f"{IDS[0]}.mp4", f"A Movie (3-10) CLIP [{IDS[1]}].mkv", f"Some-Title-{IDS[2]}.WEBM", f"{IDS[3]}.mp4.part")
    for name in (*names, "Holiday.mp4", f"worse-copy-{IDS[0]}.mp4", "readme.txt"):
        (videos / name).write_text(name)
    return folder


def placed(card, folder, target, **options):
    """Prepare and put in place; what was planned, and the target's files."""
    plan = find_files(load_card(card), list_downloads([folder], target.resolve()), target)
    list(put_in_place({**plan.annotations, **plan.videos}, copy=options.get("copy", False)))
    return plan, sorted(str(path.relative_to(target)) for path in target.rglob("*") if path.is_file())


def test_lvu_is_found_among_other_data_sets_and_under_other_names(downloads, tmp_path):
    plan, files = placed("lvu", downloads, tmp_path / "lvu")
    assert files == [
        "annotations/train.json",
        *(f"videos/{name}" for name in sorted((f"{IDS[0]}.mp4", f"{IDS[1]}.mkv", f"{IDS[2]}.webm"))),
    ]
    assert (tmp_path / "lvu" / "videos" / f"{IDS[0]}.mp4").read_text() == f"{IDS[0]}.mp4"
    assert plan.missing == [IDS[3], IDS[4]]
    assert plan.missing_files == ["val.json", "test.json"]
    assert sorted(name.rpartition("/")[2] for name in plan.extra) == ["Holiday.mp4", f"worse-copy-{IDS[0]}.mp4"]
    manifest = build_manifest(
        load_card("lvu"), annotations=tmp_path / "lvu" / "annotations", videos=tmp_path / "lvu" / "videos"
    )
    assert manifest.videos[IDS[1]].path == f"{IDS[1]}.mkv"


def test_files_are_links_and_copies_only_when_asked(downloads, tmp_path):
    source = downloads / "clips" / "2011" / f"{IDS[0]}.mp4"
    placed("lvu", downloads, tmp_path / "linked")
    placed("lvu", downloads, tmp_path / "copied", copy=True)
    assert (tmp_path / "linked" / "videos" / source.name).samefile(source)
    assert not (tmp_path / "copied" / "videos" / source.name).samefile(source)


def test_a_second_call_adds_what_is_new_and_touches_nothing(downloads, tmp_path):
    target = tmp_path / "lvu"
    placed("lvu", downloads, target)
    kept = target / "videos" / f"{IDS[1]}.mkv"
    kept.unlink()
    kept.write_text("my own")
    (downloads / f"{IDS[3]}.avi").write_text("late")
    plan, files = placed("lvu", downloads, target)
    assert [path.name for path in plan.videos] == [f"{IDS[3]}.avi"]
    assert kept.read_text() == "my own"
    assert (len(files), plan.missing) == (5, [IDS[4]])
    nothing, _ = placed("lvu", downloads, target)
    assert nothing.videos == nothing.annotations == {}


def test_a_target_among_the_downloads_is_not_searched(downloads):
    placed("lvu", downloads, downloads / "prepared")
    plan, _ = placed("lvu", downloads, downloads / "prepared")
    assert plan.extra
    assert not any("prepared" in name for name in plan.extra)


def test_two_different_annotation_files_are_not_chosen_between(downloads, tmp_path):
    other = downloads / "lvu_old"
    other.mkdir()
    (other / "train.json").write_text(json.dumps({IDS[0]: CLIP}))
    with pytest.raises(UserError, match=r"several different files could be train.json of data set 'lvu'"):
        placed("lvu", downloads, tmp_path / "lvu")
    same = (downloads / "MA-LMM" / "data" / "lvu" / "annotation" / "train.json").read_bytes()
    (other / "train.json").write_bytes(same)
    placed("lvu", downloads, tmp_path / "lvu")


def test_without_annotations_there_is_nothing_to_prepare(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no annotation file of data set 'lvu' among .*; allowed: train.json"):
        placed("lvu", tmp_path / "empty", tmp_path / "lvu")
    with pytest.raises(UserError, match=r"nowhere: downloads folder not found"):
        placed("lvu", tmp_path / "nowhere", tmp_path / "lvu")


def test_a_broken_archive_is_named(downloads, tmp_path):
    (downloads / "broken.tar").write_text("no archive" * 100)
    with pytest.raises(UserError, match=r"broken.tar: not a whole archive"):
        placed("lvu", downloads, tmp_path / "lvu")


@pytest.mark.parametrize("name", ["train.json", "dddddddddd4.mp4"])
def test_a_member_whose_bytes_have_changed_is_named_by_its_archive(downloads, tmp_path, name):
    shutil.rmtree(downloads / "clips")
    content = json.dumps(dict.fromkeys(IDS, CLIP)) if name == "train.json" else "a film " * 40
    with zipfile.ZipFile(downloads / "lvu.zip", "w") as packed:
        packed.writestr(f"lvu/{name}", content)
    whole = (downloads / "lvu.zip").read_bytes()
    (downloads / "lvu.zip").write_bytes(whole.replace(b"film" if name != "train.json" else b"office", b"other!", 1))
    with pytest.raises(UserError, match=r"lvu.zip: not a whole archive \(.*\)\. Download it again"):
        placed("lvu", downloads, tmp_path / "lvu")
    assert not list((tmp_path / "lvu").rglob("dddddddddd4*"))


def test_a_broken_annotation_file_is_named_where_it_lies(downloads, tmp_path):
    lies = downloads / "MA-LMM" / "data" / "lvu" / "annotation" / "train.json"
    lies.write_text('{"broken')
    with pytest.raises(UserError) as error:
        placed("lvu", downloads, tmp_path / "lvu")
    assert str(error.value).startswith(f"{lies}:1:2: broken JSON")


def test_the_original_lvu_release_is_found_and_its_durations_are_asked_for(downloads, tmp_path):
    release = downloads / "lvu_1.0" / "scene"
    release.mkdir(parents=True)
    (release / "test.csv").write_text(f"class_id class_name youtube_id imdb_id\n0 office {IDS[4]} tt1\n")
    (downloads / "MA-LMM" / "data" / "lvu" / "annotation" / "train.json").unlink()
    plan, files = placed("lvu", downloads, tmp_path / "lvu")
    assert files == ["annotations/scene/test.csv"]
    assert plan.missing == [IDS[4]]
    assert "durations.csv or lvu_durations.csv" in plan.missing_files


def msvd(folder):
    """The clips in a tar, the questions in a zip, as both are published."""
    folder.mkdir()
    questions = [{"answer": "man", "id": 0, "question": "who runs?", "video_id": number} for number in (1, 2, 3)]
    with zipfile.ZipFile(folder / "MSVD-QA.zip", "w") as packed:
        packed.writestr("MSVD-QA/train_qa.json", json.dumps(questions))
        packed.writestr("MSVD-QA/youtube_mapping.txt", "aaa_1_5 vid1\nbbb_2_8 vid2\nccc_0_9 vid3\n")
    for name in ("ccc_0_9.avi", "aaa_1_5.avi"):
        (folder / name).write_text(name)
    with tarfile.open(folder / "YouTubeClips.tar", "w") as archive:
        for name in ("ccc_0_9.avi", "aaa_1_5.avi"):
            archive.add(folder / name, f"YouTubeClips/{name}")
            (folder / name).unlink()
    (folder / "vid2.avi").write_text("by number")


def test_msvd_comes_out_of_its_archives_and_by_number(tmp_path):
    msvd(tmp_path / "downloads")
    plan, files = placed("msvd_qa", tmp_path / "downloads", tmp_path / "msvd")
    assert files == [
        "annotations/train_qa.json",
        "annotations/youtube_mapping.txt",
        *("videos/aaa_1_5.avi", "videos/bbb_2_8.avi", "videos/ccc_0_9.avi"),
    ]
    assert (tmp_path / "msvd" / "videos" / "ccc_0_9.avi").read_text() == "ccc_0_9.avi"
    assert (tmp_path / "msvd" / "videos" / "bbb_2_8.avi").read_text() == "by number"
    assert (plan.to_measure, plan.missing) == (True, [])


def test_measured_lengths_make_the_release_readable_and_are_kept(tmp_path):
    msvd(tmp_path / "downloads")
    target, card = tmp_path / "msvd", load_card("msvd_qa")
    placed("msvd_qa", tmp_path / "downloads", target)
    assert sorted(unmeasured(card, target)) == ["aaa_1_5", "bbb_2_8", "ccc_0_9"]
    assert write_lengths(card, target, [("aaa_1_5", 4.04)]) == 1
    assert sorted(unmeasured(card, target)) == ["bbb_2_8", "ccc_0_9"]
    assert write_lengths(card, target, [("bbb_2_8", 6.2)]) == 2
    table = (target / "annotations" / "durations.csv").read_text()
    assert table == f"{','.join(HEADER)}\naaa_1_5,4.040,40\nbbb_2_8,6.200,62\n"
    manifest = build_manifest(card, annotations=target / "annotations", videos=None)
    assert [sample.video for sample in manifest.samples] == ["aaa_1_5", "bbb_2_8"]
    assert set(manifest.left_out) == {"ccc_0_9"}


@pytest.mark.skipif(not os.path.ismount("/dev/shm"), reason="no second file system to link across")
def test_across_disks_files_become_symbolic_links(downloads, tmp_path):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        shutil.copytree(downloads, Path(other) / "downloads")
        placed("lvu", Path(other) / "downloads", tmp_path / "lvu")
        linked = tmp_path / "lvu" / "videos" / f"{IDS[0]}.mp4"
        assert linked.is_symlink()
        assert linked.read_text() == linked.name
