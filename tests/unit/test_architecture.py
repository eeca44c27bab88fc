"""Imports go one way, and a command imports only what it needs."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODEL_MAY_IMPORT = {"model", "torch", "transformers", "diffusers", "numpy", "pydantic", *sys.stdlib_module_names}
HEAVY = ("torch", "transformers", "diffusers", "ray", "zarr", "av", "decord", "numpy", "pydantic", "matplotlib")


def imports_of(package):
    """Every import of a package, at any depth of any file: (file, line, imported module)."""
    found = []
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
                names = [node.module]
            else:
                continue
            found += [(path.relative_to(ROOT), node.lineno, name) for name in names]
    assert found
    return found


def test_the_model_imports_networks_and_nothing_of_the_house():
    strangers = [where for where in imports_of("model") if where[2].split(".")[0] not in MODEL_MAY_IMPORT]
    assert strangers == []


def test_stages_never_import_the_pipeline():
    upward = [where for where in imports_of("stages") if where[2].split(".")[0] == "pipeline"]
    assert upward == []


def test_nothing_in_the_house_imports_its_tests_benchmarks_or_recipes():
    strangers = {"tests", "benchmarks", "recipes"}
    for package in ("model", "stages", "pipeline"):
        assert [where for where in imports_of(package) if where[2].split(".")[0] in strangers] == []


def texts_of(path):
    """The strings of a source file but its docstrings, save those of commands, which `--help` prints."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    commands = path.name in ("cli.py", "command_groups.py")
    bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return [
        " ".join(node.value.split())
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and (commands or id(node) not in bare)
    ]


def test_no_message_cites_a_page_that_a_wheel_lacks():
    """The pages are in the repository alone, so whoever is sent to one is told so."""
    bare = re.compile(r"docs/[\w-]+\.md(?! in the project's repository)")
    packages = [ROOT / name for name in ("pipeline", "stages", "model", "data_manifests")]
    texts = {path: texts_of(path) for package in packages for path in package.rglob("*.py")}
    for path in (path for package in packages for kind in ("yaml", "html") for path in package.rglob(f"*.{kind}")):
        lines = path.read_text(encoding="utf-8").splitlines()
        texts[path] = [" ".join(line for line in lines if not line.lstrip().startswith("#"))]
    cited = [text for found in texts.values() for text in found if "docs/" in text]
    assert any("docs/evaluation.md in the project's repository" in text for text in cited)
    assert [text for text in cited if bare.search(text)] == []


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
    ],
)
def test_a_command_does_not_import_what_it_does_not_use(imports, unneeded):
    modules = modules_after(f"import {imports}")
    assert "torch" in modules
    assert loaded(modules, unneeded) == [], f"import {imports} loads {loaded(modules, unneeded)}"
