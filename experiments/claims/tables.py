"""The result's tables in Markdown: comparisons, differences from the baseline, accuracies, and the distillation."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

_DISTILLATION = {
    "cosine": "cosine to the target, last epoch",
    "target_to_mean": "cosine of y* to its mean, last epoch",
    "mean_gate": "mean gate, all steps",
}


def markdown(content: Mapping[str, Any], statistics: Sequence[str]) -> str:
    """Four tables of the content of the JSON file.

    Args:
        content: of the file.
        statistics: the columns of the table of differences.
    """
    members = content["members"]
    compared = {entry["label"]: entry["less_none"] for entry in members.values() if "less_none" in entry}
    columns = [name for name in statistics if all(name in effects for effects in compared.values())]
    answered = next(iter(members.values()))["accuracy"]
    parts = [
        _table(
            ["", "claim", "difference", "95 % interval", "seeds above 0", "p", "p (Holm)", "verdict"],
            map(_test, content["tests"]),
        ),
        _table(
            ["less no distillation", *columns],
            ([label, *(_difference(effects[name]) for name in columns)] for label, effects in compared.items()),
        ),
        _table(
            ["accuracy, %", *answered],
            ([one["label"], *(_accuracy(one["accuracy"][name]) for name in answered)] for one in members.values()),
        ),
        _table(
            ["distillation, mean over seeds", *_DISTILLATION.values()], filter(None, map(_distilled, members.values()))
        ),
    ]
    return "\n".join(parts)


def _distilled(entry: Mapping[str, Any]) -> list[str] | None:
    found = list(entry["distillation_by_seed"].values())
    if None in found:
        return None
    return [entry["label"], *(f"{fmean(one[name] for one in found):.3f}" for name in _DISTILLATION)]


def _table(head: Sequence[str], rows: Any) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _test(row: Mapping[str, Any]) -> list[str]:
    what = [row["name"], f"{row['claim']} ({row['member']} less {row['base']}, {row['statistic']})"]
    if not row["run"]:
        return [row["name"], row["claim"], "", "", "", "", "", row["verdict"]]
    above = f"{sum(one > 0 for one in row['by_seed'])} of {len(row['by_seed'])}"
    numbers = [f"{100 * row['difference']:+.1f}", _interval(row), above, f"{row['p']:.4f}", f"{row['p_holm']:.4f}"]
    verdict = f"{row['verdict']} ({row['reading']})" if row["reading"] else row["verdict"]
    return [*what, *numbers, verdict]


def _difference(effect: Mapping[str, Any]) -> str:
    return f"{100 * effect['difference']:+.1f} ({_interval(effect)})"


def _interval(effect: Mapping[str, Any]) -> str:
    low, high = effect["ci95"]
    return f"{100 * low:+.1f} to {100 * high:+.1f}"


def _accuracy(entry: Mapping[str, Any]) -> str:
    return f"{100 * entry['mean']:.1f} ± {100 * entry['std']:.1f}"
