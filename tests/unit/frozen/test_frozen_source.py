"""What is known of a checkpoint is remembered for as long as its files are the very same, and no longer."""

import json
import os
import shutil
import time

import pytest

from model.config import EncoderConfig
from stages.frozen.load import describe_encoder
from stages.frozen.source import user_cache_folder
from stages.weights.repository import Repository

LONG_AGO_S = time.time() - 3600


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """A copy of the bundled encoder, an hour old, and a user's cache folder of its own."""
    bundled = Repository("bundled:tiny-instructblip").folder
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    folder = tmp_path / "checkpoint"
    shutil.copytree(bundled, folder)
    for path in folder.iterdir():
        os.utime(path, (LONG_AGO_S, LONG_AGO_S))
    return folder


def describe(folder):
    return describe_encoder(EncoderConfig(source=str(folder)))


def entries():
    return sorted((user_cache_folder() / "descriptions").glob("*.json"))


def test_a_second_description_reads_no_weights_and_says_the_same(checkpoint):
    first = describe(checkpoint)
    (entry,) = entries()
    assert describe(checkpoint) == first
    # Whoever reads the entry believes it, so an entry with another digest shows that it was read.
    content = json.loads(entry.read_text())
    content["described"]["digest"] = "from the entry"
    entry.write_text(json.dumps(content))
    assert describe(checkpoint).digest == "from the entry"
    assert describe(checkpoint).loading == first.loading


def test_one_changed_byte_of_the_weights_is_seen_although_size_and_time_stay(checkpoint):
    first = describe(checkpoint)
    weights = checkpoint / "model.safetensors"
    header = 8 + int.from_bytes(weights.read_bytes()[:8], "little")
    described = json.loads(weights.read_bytes()[8:header])
    begin = header + described["vision_model.embeddings.class_embedding"]["data_offsets"][0]
    with weights.open("r+b") as file:
        file.seek(begin)
        file.write(b"\1\2")
    os.utime(weights, (LONG_AGO_S, LONG_AGO_S))
    second = describe(checkpoint)
    assert second.digest != first.digest
    assert second.facts == first.facts


def test_a_file_that_appears_is_seen(checkpoint):
    described = checkpoint / "preprocessor_config.json"
    described.unlink(missing_ok=True)
    first = describe(checkpoint)
    described.write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5]}')
    assert describe(checkpoint).facts["pixels"] != first.facts["pixels"]


def test_files_of_this_moment_and_broken_entries_are_not_relied_on(checkpoint):
    weights = checkpoint / "model.safetensors"
    os.utime(weights)
    first = describe(checkpoint)
    assert entries() == []
    os.utime(weights, (LONG_AGO_S, LONG_AGO_S))
    assert describe(checkpoint) == first
    (entry,) = entries()
    entry.write_text("{")
    assert describe(checkpoint) == first
    assert json.loads(entry.read_text())["described"]["digest"] == first.digest


def test_a_cache_folder_that_cannot_be_written_costs_only_time(checkpoint):
    user_cache_folder().parent.mkdir(parents=True, exist_ok=True)
    user_cache_folder().write_text("a file where the folder should be")
    assert describe(checkpoint) == describe(checkpoint)
