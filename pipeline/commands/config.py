"""`pipeline config show`."""

from pydantic import BaseModel

from pipeline.screen.console import emit_json, print_answer
from pipeline.settings.config import PipelineConfig, Resolved, leaves, valid_keys


def run(resolved: Resolved, *, explain: bool, as_json: bool) -> None:
    """Print every key with its value, and where the value came from unless it is a default."""
    tree = resolved.config.model_dump(mode="json")
    if as_json:
        emit_json({"config": tree, "sources": resolved.sources})
        return
    keys = list(valid_keys())
    width = max(len(key) for key in keys)
    values = dict(leaves(tree))
    for key in keys:
        source = f"   # {resolved.sources[key]}" if key in resolved.sources else ""
        line = f"{key:<{width}} = {'null' if values[key] is None else values[key]}{source}"
        print_answer(line)
        if explain:
            print_answer(f"{'':<{width}}   {_meaning_of(key)}")


def _meaning_of(key: str) -> str:
    branch: type[BaseModel] = PipelineConfig
    *parents, leaf = key.split(".")
    for parent in parents:
        kind = branch.model_fields[parent].annotation
        assert isinstance(kind, type)
        assert issubclass(kind, BaseModel)
        branch = kind
    return " ".join((branch.model_fields[leaf].description or "").split())
