"""`pipeline config show`."""

from pipeline.screen.console import emit_json, print_answer
from pipeline.settings.config import Resolved, leaves, meaning_of


def run(resolved: Resolved, *, explain: bool, as_json: bool) -> None:
    """Print every key with its value, and where the value came from unless it is a default."""
    tree = resolved.config.model_dump(mode="json")
    if as_json:
        emit_json({"config": tree, "sources": resolved.sources})
        return
    values = dict(leaves(tree))
    width = max(len(key) for key in values)
    for key, value in values.items():
        source = f"   # {resolved.sources[key]}" if key in resolved.sources else ""
        print_answer(f"{key:<{width}} = {'null' if value is None else value}{source}")
        if explain:
            print_answer(f"{'':<{width}}   {meaning_of(resolved.config, key)}")
