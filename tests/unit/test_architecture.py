"""Imports go one way, and a command imports only what it needs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.rooms import PACKAGES, arrows_of, floors_of, imports_of

ROOT = Path(__file__).parents[2]
# From the ground up. A room imports rooms of lower floors only; rooms of one floor do not know each other.
FLOORS = (
    ("model",),  # config, frozen, pixels, vision, language, alignment: modules without a folder
    ("model.qformer", "model.teachers"),
    ("model.diff_lmm",),
    ("stages",),  # errors, config, atomic, records, ids, device, signals: the ground, which knows no domain
    ("stages.data", "stages.decode", "stages.cache", "stages.weights", "stages.cluster"),
    ("stages.frozen",),
    ("stages.extract", "stages.networks"),
    ("stages.batches",),
    ("stages.evaluate",),
    ("stages.train", "stages.studies"),
    ("pipeline.settings", "pipeline.screen"),
    ("pipeline.runs", "pipeline.doctor"),
    ("pipeline.reporting", "pipeline.planning"),
    ("pipeline.commands",),
    ("pipeline.studies",),
    ("pipeline",),  # options, command groups, the command line: the front door
)
MODEL_MAY_IMPORT = {"model", "torch", "transformers", "diffusers", "numpy", "pydantic", *sys.stdlib_module_names}
HEAVY = ("torch", "transformers", "diffusers", "ray", "zarr", "av", "decord", "numpy", "pydantic", "matplotlib")


def place_of(module):
    """The room that a module is in, and its floor."""
    rooms = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
    room = max((room for room in rooms if f"{module}.".startswith(f"{room}.")), key=len)
    return room, rooms[room]


def test_the_model_imports_networks_and_nothing_of_the_house():
    strangers = [where for where in imports_of(ROOT, "model") if where[1].split(".")[0] not in MODEL_MAY_IMPORT]
    assert strangers == []


def test_imports_lead_to_lower_floors():
    wrong = []
    for package in PACKAGES:
        found = list(imports_of(ROOT, package))
        assert found
        for module, imported, line in found:
            if imported.split(".")[0] in PACKAGES:
                (room, floor), (other, other_floor) = place_of(module), place_of(imported)
                if room != other and other_floor >= floor:
                    wrong.append(f"{module}:{line} imports {imported}")
    assert wrong == []


def test_no_rooms_import_each_other_in_a_circle():
    folders = [path.parent for package in PACKAGES for path in (ROOT / package).rglob("__init__.py")]
    for folder in folders:
        name = ".".join(folder.relative_to(ROOT).parts)
        assert floors_of(arrows_of(ROOT, name)) is not None, f"{name} has a circle: {arrows_of(ROOT, name)}"


def test_nothing_in_the_house_imports_its_tests_benchmarks_or_recipes():
    strangers = {"tests", "benchmarks", "recipes", "experiments"}
    for package in PACKAGES:
        assert [where for where in imports_of(ROOT, package) if where[1].split(".")[0] in strangers] == []


def modules_after(statements):
    """Names in `sys.modules` of a fresh interpreter after it has run these lines."""
    code = f"{statements}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def loaded(modules, names):
    return sorted(set(names) & modules)


def test_help_is_shown_without_any_heavy_import():
    modules = modules_after(
        "import sys, pipeline.cli\n"
        "sys.argv = ['pipeline', '--help']\n"
        "try:\n"
        "    pipeline.cli.main()\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        "else:\n"
        "    raise AssertionError('--help should end the process')\n"
    )
    assert "pipeline.cli" in modules
    assert loaded(modules, HEAVY) == [], f"pipeline --help imports {loaded(modules, HEAVY)}"


@pytest.mark.parametrize(
    ("imports", "unneeded"),
    [
        ("pipeline.commands.train", ("ray", "av", "decord", "diffusers")),
        # With the encoder that its workers build, which comes from the same library as the language model.
        (
            "pipeline.commands.extract, model.vision",
            ("transformers.models.llama.modeling_llama", "model.qformer.qformer", "model.language"),
        ),
        # Neither is installed with Ray's core.
        ("torch, stages.extract.hand_out, stages.studies.trials", ("pandas", "pyarrow", "ray.train", "ray.tune")),
    ],
)
def test_a_command_does_not_import_what_it_does_not_use(imports, unneeded):
    modules = modules_after(f"import {imports}")
    assert "torch" in modules
    assert loaded(modules, unneeded) == [], f"import {imports} loads {loaded(modules, unneeded)}"
