"""The layers of the configuration, where each value came from, and the options that the commands have."""

import shlex
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import get_args

import pytest
import typer
from pydantic import ValidationError

from model.config import DinoSettings, DiTSettings, TowerSettings
from pipeline.cli import app
from pipeline.settings import locations
from pipeline.settings.config import (
    PipelineConfig,
    dump_yaml,
    load_yaml,
    preset_names,
    resolve,
    resolve_run,
    settings_of,
    valid_keys,
)
from stages.errors import UserError

SETTINGS = {"--preset", "--config", "--set", "--json"}
DATA = {"--dataset", "--task", "--videos", "--annotations", "--cache"}
OPTIONS = {
    "": {"--verbose", "-v", "--version"},
    "demo": {"--folder", "--set", "--open", "--no-open", "--json"},
    "synthesize": {"folder", "--seed", "--size"},
    "plan": SETTINGS
    | DATA
    | {"--retry-failed", "--refresh-changed", "--calibrate-s", "--no-calibrate", "--measure-step"},
    "rehearse": SETTINGS | {"--dataset", "--task", "--language-layers"},
    "extract": SETTINGS
    | DATA
    | {"--address", "--shard", "--retry-failed", "--refresh-changed", "--dry-run", "--json-lines"},
    "train": SETTINGS | DATA | {"run", "--name", "--resume", "--profile", "--processes", "--address"},
    "evaluate": DATA | {"--run", "--split", "--method", "--output", "--set", "--json"},
    "ablate": SETTINGS
    | DATA
    | {"--study", "--seeds", "--parallel", "--cpus", "--gpus", "--address", "--retry-failed", "--dry-run"},
    "compare": {"first", "second", "--split", "--method", "--common", "--json"},
    "predict": {"video", "--question", "--run", "--start", "--method", "--task", "--set", "--json"},
    "export": {"run", "folder", "--with-heads", "--overwrite", "--json"},
    "report": {"runs", "--output", "--paper", "--json"},
    "doctor": SETTINGS | DATA | {"--quick", "--strict"},
    "cache": set(),
    "cache info": {"root", "--json"},
    "cache verify": {"root", "--repair", "--videos", "--json"},
    "cache convert": {"source", "target", "--to", "--shard-gb", "--json"},
    "cache prune": {"root", "--videos-not-in", "--task", "--annotations", "--dry-run", "--yes", "--json"},
    "data": set(),
    "data prepare": {"--dataset", "--from", "--to", "--copy", "--dry-run", "--json"},
    "data export": SETTINGS | {"folder", "--dataset", "--task", "--annotations"},
    "config": set(),
    "config show": SETTINGS | {"--dataset", "--all"},
}

# A key that every layer may set, so that one value shows which layer won.
CARD = """\
name: own
title: A card for this test
annotations: {format: jsonl, file: samples.jsonl}
videos: {pattern: "{id}.mp4"}
text: caption
tasks: {scene: {prompt: "{}", labels: [office, street]}}
frame_rule: {kind: uniform, num_frames: 4, index_fps: 10}
settings:
  train: {lr: 0.125, epochs: 3}
"""


@pytest.fixture
def card(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(CARD, encoding="utf-8")
    return str(path)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def options_of(command, path=()):
    yield " ".join(path), {text for parameter in command.params for text in parameter.opts + parameter.secondary_opts}
    for name, child in getattr(command, "commands", {}).items():
        yield from options_of(child, (*path, name))


def differing(one: PipelineConfig, other: PipelineConfig) -> dict[str, tuple]:
    mine, theirs = settings_of(one), settings_of(other)
    pairs = {key: (mine[key], theirs[key]) for key in mine}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


# --- the command line


def test_the_command_line_has_these_options_and_no_others():
    assert dict(options_of(typer.main.get_command(app))) == OPTIONS


def test_the_version_needs_no_command(pipeline):
    assert pipeline("--version") == (f"{version('diff-lmm')}\n", "")


@pytest.mark.parametrize(
    "call",
    [
        ["predict", "clip.mp4", "--question", "who?", "--question", "where?", "--run", "runs/mine"],
        ["evaluate", "--run", "runs/mine", "--split", "val", "--split=test"],
        ["data", "export", "folder", "--task", "scene", "--task", "genre"],
    ],
)
def test_an_option_of_one_value_that_is_given_twice_is_refused(pipeline, call):
    repeated = next(part for part in call if call.count(part) == 2 or f"{part}=test" in call)
    assert pipeline(*call, status=2) == ("", f"error: {repeated}: given more than once, and takes one value\n")


# --- layers


def test_each_layer_wins_over_the_one_before(card, tmp_path):
    layers = {"preset": "tiny", "options": {"data.dataset": card}}
    file = write(tmp_path / "settings.yaml", "train: {lr: 0.25}\n")
    assert resolve().config.train.lr == 1e-4
    assert resolve(options={"data.dataset": card}).config.train.lr == 0.125
    assert resolve(**layers).config.train.lr == resolve(preset="tiny").config.train.lr not in (1e-4, 0.125, 0.25)
    assert resolve(**layers, config_file=file).config.train.lr == 0.25
    assert resolve(**layers, config_file=file, overrides=["train.lr=5e-1"]).config.train.lr == 0.5


def test_a_layer_leaves_what_it_does_not_name(card):
    plain = resolve().config.train
    train = resolve(options={"data.dataset": card}, overrides=["train.seed=9"]).config.train
    assert train == plain.model_copy(update={"lr": 0.125, "epochs": 3, "seed": 9})
    assert train != plain


def test_of_two_overrides_of_one_key_the_later_wins():
    assert resolve(overrides=["train.seed=1", "train.seed=2"]).config.train.seed == 2


def test_options_of_the_command_win_over_the_file_and_options_not_given_do_not(tmp_path):
    file = write(tmp_path / "settings.yaml", "data: {task: scene, videos: /from/file}\n")
    data = resolve(config_file=file, options={"data.task": "year", "data.videos": None}).config.data
    assert (data.task, data.videos) == ("year", "/from/file")


def test_sources_name_exactly_the_values_that_are_no_defaults(card, tmp_path):
    file = write(tmp_path / "settings.yaml", "train: {seed: 7, min_lr: 0.0}\n")
    resolved = resolve(
        preset="ma-lmm-7b",
        config_file=file,
        options={"data.dataset": card, "run.name": "mine"},
        overrides=["train.loader_workers=0", "train.beta2=0.999"],
    )
    assert resolved.sources == {
        "preset": "preset ma-lmm-7b",
        "alignment.kd_weight": "preset ma-lmm-7b",
        "train.lr": "card own",
        "train.epochs": "card own",
        "train.seed": str(file),
        "data.dataset": "command line",
        "run.name": "command line",
        "train.loader_workers": "--set train.loader_workers=0",
    }
    assert set(resolved.sources) == set(differing(resolved.config, PipelineConfig()))


def test_without_any_layer_there_are_no_sources():
    assert resolve().sources == {}


@pytest.mark.parametrize(
    ("old", "new"),
    [("train.workers", "train.loader_workers"), ("train.frames_per_run", "train.frames_per_chunk")],
)
def test_a_key_of_an_earlier_version_is_refused_with_its_name_of_today_and_read_in_a_stored_run(tmp_path, old, new):
    with pytest.raises(UserError) as given:
        resolve(overrides=[f"{old}=7"])
    assert str(given.value) == f"--set {old}=7: unknown configuration key; got {old!r}. It is now {new}"
    branch, leaf = old.split(".")
    file = tmp_path / "config.yaml"
    file.write_text(f"{branch}:\n  {leaf}: 7\n")
    with pytest.raises(UserError, match=f"config.yaml: unknown configuration key.*It is now {new}"):
        resolve(config_file=file)
    read = load_yaml(file)
    assert getattr(read.train, new.removeprefix("train.")) == 7


@pytest.mark.parametrize("given", [["--workers", "2"], ["--workers=2"]])
def test_the_option_of_an_earlier_version_is_refused_with_its_name_of_today(pipeline, given):
    _, err = pipeline("train", *given, status=2)
    assert err == "error: an option has another name now; got '--workers'. Write --processes\n"


def test_a_ray_cluster_for_a_training_is_refused_with_what_starts_it_on_several_machines(pipeline):
    _, err = pipeline("train", "--processes", "2", "--address", "auto", status=2)
    assert err == (
        "error: --address: a training does not use Ray; got 'auto'. Start it with torchrun or srun on each node, see "
        "docs/training.md\n"
    )


# --- presets and cards


def test_the_full_preset_is_the_default_tree():
    assert resolve(preset="diff-lmm-7b").config == resolve().config == PipelineConfig()


def test_the_baseline_differs_from_the_full_preset_in_the_distillation_alone():
    baseline, full = resolve(preset="ma-lmm-7b").config, resolve(preset="diff-lmm-7b").config
    assert differing(baseline, full) == {
        "preset": ("ma-lmm-7b", "diff-lmm-7b"),
        "alignment.kd_weight": (0.0, 1.0),
    }


def test_the_small_preset_differs_from_the_full_one_in_the_language_model_alone():
    small, full = resolve(preset="small").config, resolve(preset="diff-lmm-7b").config
    assert differing(small, full) == {
        "preset": ("small", "diff-lmm-7b"),
        "language.source": ("Qwen/Qwen2.5-0.5B-Instruct", "Salesforce/instructblip-vicuna-7b"),
    }


@pytest.mark.parametrize("preset", ["diff-lmm-7b", "ma-lmm-7b"])
@pytest.mark.parametrize(("dataset", "longest"), [("lvu", 4), ("msvd_qa", 9)])
def test_answers_have_the_room_that_they_have_in_ma_lmm(preset, dataset, longest):
    language = resolve(preset=preset, options={"data.dataset": dataset}).config.language
    assert (language.max_new_tokens, language.min_new_tokens) == (longest, 0)


def test_msvd_qa_brings_its_own_memory_and_lambda():
    config = resolve(options={"data.dataset": "msvd_qa"}).config
    assert (config.qformer.memory_slots, config.alignment.kd_weight) == (10, 5e-4)
    assert (config.language.max_new_tokens, config.language.length_penalty) == (9, 0.0)


@pytest.mark.parametrize(("preset", "recipe"), [("ma-lmm-7b", (5, 128)), ("diff-lmm-7b", (20, 64))])
def test_on_msvd_qa_the_baseline_has_ma_lmms_epochs_and_batch_and_the_full_model_the_papers(preset, recipe):
    resolved = resolve(preset=preset, options={"data.dataset": "msvd_qa"})
    assert (resolved.config.train.epochs, resolved.config.train.batch_size) == recipe
    said = resolved.sources.get("train.epochs")
    assert said == ("card msvd_qa for preset ma-lmm-7b" if preset == "ma-lmm-7b" else None)
    lvu = resolve(preset=preset).config.train
    assert (lvu.epochs, lvu.batch_size) == (20, 64)


def test_what_a_card_says_for_a_preset_wins_over_both_and_the_user_over_it(card):
    with_presets = "presets: {tiny: {train: {lr: 0.75}}, ma-lmm-7b: {train: {lr: 0.5}}}\n"
    Path(card).write_text(CARD + with_presets, encoding="utf-8")

    def rate(preset, *overrides):
        return resolve(preset=preset, options={"data.dataset": card}, overrides=overrides).config.train.lr

    assert [rate(name) for name in ("tiny", "ma-lmm-7b", "diff-lmm-7b")] == [0.75, 0.5, 0.125]
    assert rate("tiny", "train.lr=0.25") == 0.25
    Path(card).write_text(CARD + with_presets.replace("ma-lmm-7b", "ma-lmm-7"), encoding="utf-8")
    with pytest.raises(UserError, match=r"card own: presets: unknown preset; got 'ma-lmm-7'.*mean ma-lmm-7b\?"):
        rate("tiny")


@pytest.mark.parametrize(
    "dataset",
    ["lvu", "synthetic", "msvd_qa"],
)
def test_the_baseline_never_distils(dataset):
    assert resolve(preset="ma-lmm-7b", options={"data.dataset": dataset}).config.alignment.kd_weight == 0


def test_the_data_set_of_a_preset_decides_which_card_is_read():
    assert resolve(preset="tiny").config.data.dataset == "synthetic"


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_carries_its_own_name(name):
    assert resolve(preset=name).config.preset == name


def test_a_preset_set_by_override_or_file_is_taken_and_not_just_named(tmp_path):
    file = write(tmp_path / "settings.yaml", "preset: ma-lmm-7b\n")
    assert resolve(overrides=["preset=tiny"]).config == resolve(preset="tiny").config
    assert resolve(config_file=file).config == resolve(preset="ma-lmm-7b").config
    assert resolve(config_file=file, preset="tiny").config == resolve(preset="tiny").config


# --- mistakes


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.lrr=1", "--set train.lrr=1: unknown configuration key; got 'train.lrr'. Did you mean train.lr?"),
        ("alignment.kd_wieght=0", "got 'alignment.kd_wieght'. Did you mean alignment.kd_weight?"),
        ("optimizer.lr=1", "Did you mean train.lr?"),
        ("memory_slots=3", "Did you mean qformer.memory_slots?"),
        ("zzz=1", "got 'zzz'. `pipeline config show --all` lists every key"),
        ("train.lr", "--set: not of the form key=value; got 'train.lr'. Write for example train.lr=3e-4"),
        ("=3", "--set: not of the form key=value; got '=3'"),
        ("run.name=2024-02-30", "--set: the value of run.name is not valid YAML; got '2024-02-30'"),
        ("train.lr=[", "--set: the value of train.lr is not valid YAML; got '['"),
        ("train.lr=-1", "--set train.lr=-1: train.lr: Input should be greater than 0; got -1"),
        ("train.lr=fast", "train.lr: Input should be a valid number, unable to parse string as a number; got 'fast'"),
        ("train.lr=.inf", "train.lr: Input should be a finite number; got inf"),
        ("alignment.kd_weight=.nan", "alignment.kd_weight: Input should be"),
        ("extract.decoder=opencv", "extract.decoder: Input should be 'pyav', 'decord' or 'torchcodec'; got 'opencv'"),
        ("train.kd_frames=0", "'all' or 'last' or: Input should be greater than 0; got 0"),
        ("alignment.levels=[0, 1]", "alignment.levels: levels are numbered from 1 (the embeddings); got [0, 1]"),
        ("alignment.levels=[3, 3]", "alignment.levels: each level may be named once; got [3, 3]"),
        ("alignment.pooling=middle", "alignment.pooling: Input should be 'before', 'after' or 'loss'; got 'middle'"),
        ("alignment.shared_gate=perhaps", "alignment.shared_gate: Input should be a valid boolean"),
        ("alignment.levels=[3, x]", "alignment.levels: Input should be a valid integer"),
        ("preset=5", "unknown preset; got 5; allowed: diff-lmm-7b, ma-lmm-7b, small, tiny"),
        ("data.dataset=lvuu", "unknown data set; got 'lvuu'; allowed: lvu, msvd_qa, synthetic, or the path of a"),
    ],
)
def test_a_wrong_override_is_one_line_with_key_source_and_value(override, said):
    with pytest.raises(UserError) as caught:
        resolve(overrides=[override])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(UserError, match=r"unknown preset; got 'tinny'; allowed: .*tiny\. Did you mean tiny\?"):
        resolve(preset="tinny")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train: {epoch: 3}\n", "unknown configuration key; got 'train.epoch'. Did you mean train.epochs?"),
        ("train: {epochs: 0}\n", "train.epochs: Input should be greater than 0; got 0"),
        ("train: {lr: {peak: 1}}\n", "unknown configuration key; got 'train.lr.peak'. Did you mean train.lr?"),
        ("- train\n", "the configuration must be a mapping; got 'list'"),
        ("train: {\n", ":2:1: broken YAML: expected"),
        ("train: {lr: 1}\nextract: {}\ntrain: {epochs: 2}\n", ":3:1: broken YAML: the key 'train' stands here again"),
        ("train.lr: 1.0\ntrain: {lr: 2.0}\n", "train.lr is there twice, once written with dots; got 2.0"),
        ("run: {name: 2024-02-30}\n", "broken YAML: day is out of range for month"),
        ("train:\n  lr: 1\n  epochs: 2\n  lr: 2\n", ":4:3: broken YAML: the key 'lr' stands here again"),
    ],
)
def test_a_mistake_in_a_file_names_the_file(tmp_path, text, said):
    file = write(tmp_path / "settings.yaml", text)
    with pytest.raises(UserError) as caught:
        resolve(config_file=file)
    assert str(caught.value).startswith(f"{file}:")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_absent_or_no_text_is_named(tmp_path):
    with pytest.raises(UserError, match=r"absent\.yaml: file not found"):
        resolve(config_file=tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"binary\.yaml: not UTF-8 text \(byte 0\)"):
        resolve(config_file=tmp_path / "binary.yaml")


def test_a_mistake_in_a_card_names_the_card(tmp_path):
    path = write(tmp_path / "own.yaml", CARD.replace("epochs: 3", "epoch: 3"))
    with pytest.raises(UserError, match=r"card own: unknown configuration key; got 'train.epoch'"):
        resolve(options={"data.dataset": str(path)})


# --- values and the saved tree


def test_numbers_may_be_written_with_an_exponent_and_no_point():
    train = resolve(overrides=["train.lr=3e-4", "train.weight_decay=1E-2"]).config.train
    assert (train.lr, train.weight_decay) == (3e-4, 1e-2)


def test_lists_words_and_null_are_read_as_yaml():
    config = resolve(overrides=["alignment.levels=[9, 3]", "train.kd_frames=5", "cache.root=null"]).config
    assert (config.alignment.levels, config.train.kd_frames, config.cache.root) == ((3, 9), 5, None)


@pytest.mark.parametrize("preset", preset_names())
def test_the_written_tree_reads_back_equal(tmp_path, preset):
    overrides = ["train.lr=3e-4", "train.warmup_start_lr=1e-12", "alignment.levels=[1, 13]", "run.name='007'"]
    config = resolve(preset=preset, overrides=overrides).config
    file = write(tmp_path / "config.yaml", dump_yaml(config))
    assert resolve_run(file, ()) == config
    assert resolve(config_file=file).config == config


def test_a_saved_run_takes_overrides_but_no_unknown_key(tmp_path):
    file = write(tmp_path / "config.yaml", dump_yaml(resolve(preset="tiny").config))
    assert resolve_run(file, ["language.num_beams=1"]).language.num_beams == 1
    with pytest.raises(UserError, match=r"Did you mean language\.num_beams"):
        resolve_run(file, ["language.num_beam=1"])


# --- the teacher's kind


@pytest.mark.parametrize(
    "overrides", [["teacher.kind=tower", "teacher.block=2"], ["teacher.block=2", "teacher.kind=tower"]]
)
def test_another_kind_of_teacher_takes_nothing_from_the_presets(overrides):
    resolved = resolve(preset="tiny", overrides=overrides)
    assert resolved.config.teacher == TowerSettings(block=2)
    named = {key: source for key, source in resolved.sources.items() if key.startswith("teacher.")}
    assert named == {
        f"teacher.{name}": f"--set teacher.{name}={value}" for name, value in [("kind", "tower"), ("block", 2)]
    }


def test_a_preset_says_more_of_the_teacher_where_its_kind_stays():
    config = resolve(preset="tiny", overrides=["teacher.kind=dit", "teacher.block=2"]).config
    assert config.teacher == DiTSettings(source="bundled:tiny-dit", block=2)


def test_a_run_may_be_asked_with_another_kind_of_teacher(tmp_path):
    file = write(tmp_path / "config.yaml", dump_yaml(resolve(preset="tiny", overrides=["teacher.timestep=3"]).config))
    assert resolve_run(file, ["teacher.pooling=class", "teacher.kind=dinov2"]).teacher == DinoSettings(pooling="class")


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["teacher.kind=dinov"],
            "--set teacher.kind=dinov: unknown kind of teacher; got 'dinov'; allowed: dit, dinov2, tower. "
            "Did you mean 'dinov2'?",
        ),
        (
            ["teacher.kind=tower", "teacher.timestep=2"],
            "--set teacher.timestep=2: a teacher of kind tower does not read it; got 'teacher.timestep'; allowed: "
            "teacher.kind, teacher.source, teacher.random_seed, teacher.block, teacher.pooling",
        ),
        (
            ["teacher.kind=tower", "teacher.pooling=max"],
            "--set teacher.pooling=max: teacher.pooling: Input should be 'mean' or 'class'; got 'max'",
        ),
        (
            ["teacher.blok=2"],
            "--set teacher.blok=2: unknown configuration key; got 'teacher.blok'. Did you mean teacher.block?",
        ),
    ],
)
def test_what_a_kind_of_teacher_does_not_read_is_refused_in_one_line(overrides, line):
    with pytest.raises(UserError) as refused:
        resolve(overrides=overrides)
    assert str(refused.value) == line


@pytest.mark.parametrize(
    ("key", "now"),
    [
        ("dino_block", "teacher.block with teacher.kind=dinov2"),
        ("dino_pooling", "teacher.pooling with teacher.kind=dinov2"),
        ("tower_block", "teacher.block with teacher.kind=tower"),
        ("tower_pooling", "teacher.pooling with teacher.kind=tower"),
    ],
)
def test_a_former_setting_of_a_teacher_is_refused_with_its_new_name(tmp_path, key, now):
    file = write(tmp_path / "settings.yaml", f"teacher: {{{key}: 2}}\n")
    for given, where in (
        ({"overrides": [f"teacher.{key}=2"]}, f"--set teacher.{key}=2"),
        ({"config_file": file}, str(file)),
    ):
        with pytest.raises(UserError) as refused:
            resolve(**given)
        assert str(refused.value) == f"{where}: unknown configuration key; got 'teacher.{key}'. It is now {now}"


@pytest.mark.parametrize("overrides", [[], ["teacher.kind=dinov2"], ["teacher.kind=tower", "teacher.block=3"]])
@pytest.mark.parametrize("preset", ["tiny", "diff-lmm-7b"])
def test_the_command_that_fills_a_cache_names_the_kind_of_teacher(overrides, preset):
    config = resolve(preset=preset, options={"data.dataset": "lvu"}, overrides=overrides).config
    words = shlex.split(locations.extract_command(config))
    named = [value for option, value in pairwise(words) if option == "--set"]
    assert resolve(preset=preset, options={"data.dataset": "lvu"}, overrides=named).config == config


def test_nothing_in_the_tree_can_be_changed():
    config = resolve().config
    with pytest.raises(ValidationError, match="frozen"):
        config.train.lr = 1.0
    with pytest.raises(ValidationError, match="frozen"):
        config.train = config.train
    with pytest.raises(ValidationError, match="Extra inputs"):
        PipelineConfig(training={})


def test_every_key_says_what_it_means():
    def descriptions(branch):
        for field in branch.model_fields.values():
            kinds = [kind for kind in (field.annotation, *get_args(field.annotation)) if hasattr(kind, "model_fields")]
            yield from [text for kind in kinds for text in descriptions(kind)] or [field.description]

    found = list(descriptions(PipelineConfig))
    assert len(found) >= len(valid_keys())
    assert all(found)
