"""The rooms of the house: how many there are in each folder, who imports whom, and how high they stand on each other.

    python -m benchmarks.rooms          # this tree; another one: python -m benchmarks.rooms FOLDER

A room of a folder is a module or a folder in it. An arrow leads from a room to each room of the same folder that it
imports; floors are the longest chain of arrows.
"""

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("model", "stages", "pipeline")


def imports_of(root: Path, package: str) -> Iterator[tuple[str, str, int]]:
    """Every import of the house within a package, at any depth of any file: importing module, imported one, line."""
    for path in sorted((root / package).rglob("*.py")):
        module = ".".join(path.relative_to(root).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    yield module, inner if _is_module(root, inner) else node.module, node.lineno
            elif isinstance(node, ast.Import):
                yield from ((module, alias.name, node.lineno) for alias in node.names)


def _is_module(root: Path, name: str) -> bool:
    path = root / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").is_file()


def arrows_of(root: Path, folder: str) -> dict[str, set[str]]:
    """Of each room of a folder ("stages", "stages.cache"), the rooms of that folder which it imports."""
    arrows: dict[str, set[str]] = {}
    for path in sorted((root / folder.replace(".", "/")).iterdir()):
        if (path.suffix == ".py" and path.stem != "__init__") or (path / "__init__.py").is_file():
            arrows[path.stem] = set()
    for module, imported, _ in imports_of(root, folder.replace(".", "/")):
        room, other = (_room_in(folder, name) for name in (module, imported))
        if room in arrows and other in arrows and room != other:
            arrows[room].add(other)
    return arrows


def _room_in(folder: str, module: str) -> str:
    inner = module.removeprefix(f"{folder}.")
    return inner.split(".")[0] if inner != module else ""


def floors_of(arrows: dict[str, set[str]]) -> int | None:
    """The longest chain of rooms; None where they import each other in a circle."""
    heights: dict[str, int] = defaultdict(int)
    try:
        for room in TopologicalSorter(arrows).static_order():
            heights[room] = 1 + max((heights[below] for below in arrows[room]), default=0)
    except CycleError:
        return None
    return max(heights.values(), default=0)


def main() -> None:
    root = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT
    folders = [
        ".".join(p.parent.relative_to(root).parts) for top in PACKAGES for p in (root / top).rglob("__init__.py")
    ]
    print(f"{'folder':<28}{'rooms':>6}{'floors':>8}{'arrows':>8}{'lines':>8}")
    for folder in sorted(folders, key=lambda name: (PACKAGES.index(name.split(".")[0]), name)):
        arrows = arrows_of(root, folder)
        lines = sum(len(p.read_text("utf-8").splitlines()) for p in (root / folder.replace(".", "/")).rglob("*.py"))
        floors = floors_of(arrows) if arrows else 0
        count = sum(map(len, arrows.values()))
        print(f"{folder:<28}{len(arrows):>6}{'circle' if floors is None else floors:>8}{count:>8}{lines:>8}")


if __name__ == "__main__":
    main()
