"""Training and evaluation with the language model in 8 and 4 bits, by the real commands, and what is refused."""

import importlib.util
import json

import pytest
import torch

from pipeline.commands import evaluate, export
from pipeline.commands import train as command
from pipeline.settings.config import load_yaml, resolve
from stages.errors import UserError
from stages.networks.pretrained import LoadedModel
from tests.training_world import PATCHES, SETTINGS, WIDTH, make, rows_of, weights

KINDS = ("int8", "nf4")
# What a coarser language model does to the first loss of a model that has learned nothing: relative.
NEAR = {"int8": 0.02, "nf4": 0.2}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make(tmp_path_factory.mktemp("quantized"))


@pytest.fixture
def resolved(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def of(*more, name="run"):
        options = {
            "data.dataset": str(world.folder / "card.yaml"),
            "data.annotations": str(world.folder),
            "cache.root": str(world.cache),
            "run.name": name,
        }
        return resolve(preset="tiny", options=options, overrides=[*SETTINGS, "train.epochs=1", *more])

    return of


def trained(resolved, **keywords):
    return command.run(resolved, **{"resume": False, "as_json": False, **keywords})


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_training_learns_is_kept_without_the_language_model_and_answers(resolved, kind):
    pytest.importorskip("bitsandbytes")
    plain = trained(resolved(name="plain"))
    run = trained(resolved(f"language.quantize={kind}", "train.epochs=2"))
    rows, its = rows_of(run), rows_of(plain)
    assert rows[0]["answer_loss"] != its[0]["answer_loss"]
    assert rows[0]["answer_loss"] == pytest.approx(its[0]["answer_loss"], rel=NEAR[kind])
    assert rows[-1]["answer_loss"] < 0.8 * rows[0]["answer_loss"]
    assert load_yaml(run / "config.yaml").language.quantize == kind
    assert weights(run).keys() == weights(plain).keys()
    assert not any("language.model" in name for _, name in weights(run))
    evaluate.run(run, split="val", overrides=[], as_json=False, method="both")
    record = json.loads((run / "evaluation-val.json").read_text())
    assert record["settings"]["language"]["quantize"] == kind
    # Of the same checkpoint, the best, by the same quantised model.
    top1 = json.loads((run / "metrics-val.json").read_text())["scene"]["top1"]
    assert top1 == max(row["top1"] for row in rows_of(run, "val"))
    with pytest.raises(UserError, match=r"language.quantize"):
        trained(resolved("train.epochs=2", "language.quantize=none"), resume=True)


def test_a_finished_run_may_be_asked_with_another_setting(resolved):
    pytest.importorskip("bitsandbytes")
    run = trained(resolved("language.quantize=nf4"))
    evaluate.run(run, split="val", overrides=["language.quantize=none"], as_json=False)
    record = json.loads((run / "evaluation-val.json").read_text())
    assert record["settings"]["language"]["quantize"] == "none"
    assert record["overrides"] == ["language.quantize=none"]


def test_an_exported_model_is_quantised_as_the_run_was(resolved, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    run = trained(resolved("language.quantize=nf4"))
    export.run(run, tmp_path / "model", with_heads=False, as_json=False)
    loaded = LoadedModel.from_pretrained(tmp_path / "model")
    assert loaded.about.networks.language.quantize == "nf4"
    assert any(isinstance(module, bitsandbytes.nn.Linear4bit) for module in loaded.model.language.modules())
    (reply,) = loaded.answer(torch.zeros(1, 2, PATCHES, WIDTH), ["what is the scene of the movie?"])
    assert len(reply.answers) == loaded.about.networks.language.num_beams


def test_without_bitsandbytes_one_line_says_what_to_install(resolved, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else real(name))
    said = r"language.quantize: bitsandbytes is not installed; got 'int8'\. Install it with .*diff-lmm\[quant\]"
    with pytest.raises(UserError, match=said):
        trained(resolved("language.quantize=int8"))
    run = trained(resolved())
    with pytest.raises(UserError, match=said):
        evaluate.run(run, split="val", overrides=["language.quantize=int8"], as_json=False)


def test_a_quantised_language_model_is_not_cut_into_pieces(resolved):
    given = ("language.quantize=nf4", "train.shard_language=fsdp", "train.processes=2")
    with pytest.raises(UserError, match=r"train.shard_language: a quantised language model cannot .*; got 'fsdp'"):
        trained(resolved(*given))


def test_a_misspelt_setting_is_told_what_is_allowed(resolved):
    with pytest.raises(UserError, match=r"language.quantize.*'none', 'int8' or 'nf4'; got 'int4'"):
        resolved("language.quantize=int4")
