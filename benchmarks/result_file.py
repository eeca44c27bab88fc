"""Where a benchmark's result goes."""

import json
from datetime import UTC, datetime
from pathlib import Path


def write_result(name, result):
    """Write what JSON can hold of a benchmark's result into `benchmarks/results/NAME-DATE.json`, and print where."""
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    target = folder / f"{name}-{datetime.now(UTC):%Y-%m-%d}.json"
    target.write_text(json.dumps(result, indent=1, default=str) + "\n", encoding="utf-8")
    print(f"written to {target}")
