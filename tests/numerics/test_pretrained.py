"""A finished model written as a folder and read back answers as before; so does training that starts from it."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_qformer import randomise

from pipeline.settings.config import resolve
from stages.data.cards import load_card
from stages.errors import UserError
from stages.networks.build import build_diff_lmm, load_language
from stages.networks.checkpoint import Checkpoints, Position
from stages.networks.exported import About, is_export, open_export, write_export
from stages.networks.pretrained import LoadedModel

WIDTH, TARGETS = 96, 96
QUESTIONS = ["What is the SCENE of the movie?", "what is the year of the movie?"]


@pytest.fixture(scope="module")
def about():
    config = resolve(preset="tiny").config
    return About.of(config, load_card("synthetic"), "all", "float32")


@pytest.fixture(scope="module")
def loaded(about):
    torch.manual_seed(0)
    made = LoadedModel.start(about, visual_width=WIDTH, target_width=TARGETS, seed=4)
    for part in (made.model.qformer, made.model.language_projection, made.model.alignment):
        randomise(part)
    made.model.alignment.observe(torch.randn(2, 3, TARGETS))
    return made


@pytest.fixture(scope="module")
def exported(loaded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    loaded.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def features():
    return torch.randn(2, 7, 65, WIDTH, generator=torch.Generator().manual_seed(1))


def trained(model):
    return {name: value for name, value in model.trained_tensors().items() if not name.startswith("alignment.")}


# --- what is written


def test_the_folder_holds_what_was_trained_and_nothing_frozen(loaded, exported):
    assert {path.name for path in exported.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    tensors = load_file(exported / "model.safetensors")
    assert tensors.keys() == trained(loaded.model).keys()
    assert all(torch.equal(tensors[name], value) for name, value in trained(loaded.model).items())


def test_the_heads_go_along_when_asked(loaded, about, tmp_path):
    write_export(tmp_path, loaded.model.trained_tensors(), about, with_heads=True)
    assert load_file(tmp_path / "model.safetensors").keys() == loaded.model.trained_tensors().keys()


def test_the_configuration_names_data_set_prompts_and_frozen_networks(exported, about):
    content = json.loads((exported / "config.json").read_text())
    assert content["format"] == "diff-lmm-1"
    assert content["description"]["card"]["tasks"]["scene"]["prompt"] == "what is the scene of the movie?"
    assert content["visual_width"] == WIDTH
    assert content["encoder"]["source"] == content["language"]["source"] == "bundled:tiny-instructblip"
    assert re.fullmatch("[0-9a-f]{64}", content["language"]["digest"])
    assert content["encoder"]["digest"] != content["language"]["digest"]
    assert open_export(str(exported)).record.description == about


def test_the_card_names_licences_tasks_and_sources_and_is_valid(exported):
    from huggingface_hub import ModelCard

    card = ModelCard.load(exported / "README.md")
    assert card.data.license == "other"
    assert card.data.library_name == "diff-lmm"
    for text in ("CC-BY-NC-4.0", "InstructBLIP-Vicuna", "bundled:tiny-dit", "what is the genre of the movie?"):
        assert text in card.text


def test_a_second_export_replaces_the_first_whole(loaded, about, tmp_path):
    write_export(tmp_path, loaded.model.trained_tensors(), about)
    other = about.model_copy(update={"task": "scene"})
    loaded_again = {name: value + 1 for name, value in loaded.model.trained_tensors().items()}
    write_export(tmp_path, loaded_again, other)
    assert open_export(str(tmp_path)).record.description.task == "scene"
    assert "task scene" in (tmp_path / "README.md").read_text()
    table = "qformer.frame_positions.weight"
    assert torch.equal(load_file(tmp_path / "model.safetensors")[table], loaded_again[table])


# --- what is read back


def test_the_model_read_back_gives_the_same_answers(loaded, exported, features):
    again = LoadedModel.from_pretrained(exported)
    assert again.model.alignment is None
    assert not again.model.training
    expected, found = (model.answer(features, QUESTIONS) for model in (loaded, again))
    assert found == expected
    assert len(found) == 2
    assert len(found[0].answers) == loaded.about.networks.language.num_beams
    other = again.answer(-features, QUESTIONS)
    assert [reply.log_probability for reply in other] != [reply.log_probability for reply in found]


def test_questions_are_put_as_training_put_them(loaded):
    assert loaded.about.prompt("What is the SCENE of the movie?") == ("what is the scene of the movie?", "{}")
    wrapped = loaded.about.model_copy(update={"card": load_card("msvd_qa")})
    assert wrapped.prompt("Who runs?") == ("who runs?", "Question: {} Short answer:")


def test_it_is_written_again_as_it_was_read(exported, tmp_path):
    LoadedModel.from_pretrained(exported).save_pretrained(tmp_path)
    for name in ("config.json", "model.safetensors", "README.md"):
        assert (tmp_path / name).read_bytes() == (exported / name).read_bytes()


def test_a_model_of_the_hub_is_found_where_it_was_downloaded(exported, features, loaded, tmp_path, monkeypatch):
    """The hub's own layout on disk."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    commit = "0" * 40
    snapshot = tmp_path / "models--someone--diff-lmm" / "snapshots" / commit
    shutil.copytree(exported, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "v1").write_text(commit)
    again = LoadedModel.from_pretrained("someone/diff-lmm", revision="v1", cache_dir=tmp_path)
    assert again.answer(features, QUESTIONS) == loaded.answer(features, QUESTIONS)
    with pytest.raises(UserError, match="the model hub gave no answer; got 'someone/diff-lmm'"):
        open_export("someone/diff-lmm", {"revision": "v2", "cache_dir": tmp_path})


# --- what is refused


@pytest.fixture
def copied(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "copied")


def change(folder, **changed):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def message_of(folder, **options):
    with pytest.raises(UserError) as caught:
        LoadedModel.from_pretrained(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_another_language_model_under_the_same_name_is_refused(copied):
    change(copied, language={"source": "bundled:tiny-instructblip", "digest": "0" * 64})
    said = message_of(copied)
    assert said.startswith("bundled:tiny-instructblip: not the language model that the model was trained with")
    assert "000000000000..." in said
    assert LoadedModel.from_pretrained(copied, verify=False)


def test_another_encoder_under_the_same_name_is_refused(exported, about):
    export = open_export(str(exported))
    export.require_encoder(about.networks.encoder)
    record = export.record.model_copy(update={"encoder": export.record.language})
    with pytest.raises(UserError, match="not the visual encoder that the model was trained with"):
        replace(export, record=record).require_encoder(about.networks.encoder)


def test_a_frozen_network_that_moved_is_taken_from_its_new_place(copied, features, loaded, about, tmp_path):
    from stages.weights.repository import Repository

    moved = shutil.copytree(Repository(about.networks.language.source).folder, tmp_path / "moved")
    content = json.loads((copied / "config.json").read_text())
    content["description"]["networks"]["language"]["source"] = "nobody/nothing"
    change(copied, **content)
    assert "nobody/nothing" in message_of(copied)
    again = LoadedModel.from_pretrained(copied, sources={"language": str(moved)})
    assert again.answer(features, QUESTIONS) == loaded.answer(features, QUESTIONS)


def test_a_folder_that_is_no_export_is_refused(copied):
    change(copied, format="diff-lmm-0")
    assert "not an exported model of this version; allowed: format diff-lmm-1" in message_of(copied)
    assert is_export(copied)
    change(copied, format="diff-lmm-1", surplus=3)
    assert "unknown key 'surplus'" in message_of(copied)
    (copied / "config.json").unlink()
    assert not is_export(copied)
    assert "file config.json is missing" in message_of(copied)


def test_tensors_that_do_not_fit_are_named(copied):
    tensors = load_file(copied / "model.safetensors")
    query = "qformer.query_tokens"
    save_file({**tensors, query: tensors[query][:, 1:].contiguous()}, copied / "model.safetensors")
    assert f"{query}: checkpoint (1, 7, 64), model (1, 8, 64)" in message_of(copied)
    save_file({name: value for name, value in tensors.items() if name != query}, copied / "model.safetensors")
    assert query in message_of(copied)


# --- training that starts from it


def save_run(folder, model):
    Checkpoints(folder).save(model.trained_tensors(), {}, Position(1, 8), keep=1)
    return folder


def start_of(kind, loaded, exported, folder):
    """A place of each kind that training may start from, and whether it has heads."""
    if kind == "export":
        return exported, False
    if kind == "file":
        return exported / "model.safetensors", False
    run = save_run(folder, loaded.model)
    return run if kind == "run" else run / "checkpoints" / "step-00000008", True


def begin(about, start, reports, **changed):
    qformer = about.networks.qformer.model_copy(update={"start": str(start)})
    networks = about.networks.model_copy(update={"qformer": qformer, **changed})
    model = LoadedModel.start(
        about.model_copy(update={"networks": networks}), visual_width=WIDTH, target_width=TARGETS, seed=9
    )
    reports.extend(model.loading)
    return model.model


@pytest.mark.parametrize("kind", ["export", "file", "run", "checkpoint"])
def test_training_starts_from_a_model_of_our_own(loaded, exported, about, tmp_path, kind):
    (start, with_heads), reports = start_of(kind, loaded, exported, tmp_path / "run"), []
    own = begin(about, start, reports).trained_tensors()
    same_anyhow = {"alignment.level_numbers"}
    for name, value in loaded.model.trained_tensors().items():
        assert torch.equal(own[name], value) == (
            with_heads or name in same_anyhow or not name.startswith("alignment.")
        ), name
    assert [report.source for report in reports[1:]] == ["bundled:tiny-instructblip", str(start)]
    last = reports[-1]
    assert last.left == ()
    buffers = {"alignment.level_numbers", "alignment.target_mean", "alignment.targets_seen"}
    assert set(last.taken) | set(last.initialised) == own.keys() - (set() if with_heads else buffers)
    assert all(name.startswith("alignment.") for name in last.initialised)
    assert bool(last.initialised) != with_heads


@pytest.mark.parametrize("change", [{"gate_width": 10}, {"levels": (1, 2, 3)}, {"levels": (5,)}, {"shared_head": True}])
def test_heads_of_other_shapes_or_levels_start_anew(loaded, about, tmp_path, caplog, change):
    assert about.networks.alignment.levels == (3, 4, 5)
    alignment = about.networks.alignment.model_copy(update=change)
    reports = []
    model = begin(about, save_run(tmp_path / "run", loaded.model), reports, alignment=alignment)
    assert "alignment keeps its starting values" in caplog.text
    assert any(name.startswith("alignment.") for name in reports[-1].left)
    assert torch.equal(model.qformer.query_tokens, loaded.model.qformer.query_tokens)


def test_the_first_report_is_the_language_models(about, exported):
    reports = []
    begin(about, exported, reports)
    assert {name.split(".")[0] for name in reports[0].taken} == {"language_model"}
    assert {name.split(".")[0] for name in reports[0].left} >= {"vision_model", "qformer"}


def test_an_instructblip_folder_is_no_start(about):
    from stages.weights.repository import Repository

    folder = Repository(about.networks.language.source).folder
    with pytest.raises(UserError, match="holds no tensor of the Q-Former"):
        begin(about, folder, [])


def test_without_a_start_nothing_is_laid_over(about):
    reports = []
    build_diff_lmm(
        about.networks,
        language=load_language(about.networks.language, torch.float32),
        special=LoadedModel.start(about, visual_width=WIDTH, target_width=TARGETS, seed=0).tokenizers.special,
        visual_width=WIDTH,
        target_width=None,
        seed=0,
        on_loaded=reports.append,
    )
    assert [report.initialised for report in reports] == [("qformer.frame_positions.weight",)]
