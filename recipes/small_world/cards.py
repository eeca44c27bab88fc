"""Writes a card beside each network: what it is, what it learned from, what it knows, what it is not for."""

from pathlib import Path

from recipes.small_world.assemble import TEACHER_FOLDER, TOWER_FOLDER
from recipes.small_world.record import Record
from stages.atomic import atomic_write_text

CARD = "MODEL_CARD.md"

# Texts with places for a run's facts.
_TEXTS = Path(__file__).parent
_COMMON = "card_common.md"


def write_cards(folder: Path, record: Record) -> None:
    """Write both cards into the networks' folders."""
    facts = _facts(record)
    for name, text, features in (
        (TOWER_FOLDER, "card_tower.md", ("tower mean", "tower patches")),
        (TEACHER_FOLDER, "card_teacher.md", tuple(name for name in record.probes if name.startswith(("vae", "y*")))),
    ):
        table = probe_table({one: record.probes[one] for one in features})
        template = "".join((_TEXTS / part).read_text(encoding="utf-8") for part in (text, _COMMON))
        atomic_write_text(folder / name / CARD, template.format(**facts, table=table))


def probe_table(probes: dict[str, dict[str, float]]) -> str:
    """The results as a Markdown table, a row for each kind of features."""
    asked = list(next(iter(probes.values())))
    lines = [f"| features | {' | '.join(asked)} |", f"| --- |{' --- |' * len(asked)}"]
    lines += [f"| {name} | {' | '.join(f'{scores[one]:.2f}' for one in asked)} |" for name, scores in probes.items()]
    return "\n".join(lines)


def _facts(record: Record) -> dict[str, object]:
    settings = record.settings
    vae, dit, tower, reading = (settings[name] for name in ("vae", "diffusion", "contrast", "reading"))
    return {
        **settings["frames"],
        **record.versions,
        **{f"{name}_steps": steps for name, steps in record.steps.items()},
        **{f"{name}_loss": loss for name, loss in record.losses.items()},
        "seed": settings["seed"],
        "probe_videos": settings["probe_videos"],
        "probe_held_out": settings["probe_held_out"],
        "tower_layers": tower["layers"],
        "tower_width": tower["width"],
        "tower_batch": tower["groups"] * tower["group_size"],
        "names_detail": tower["names_detail"],
        "read_layers": reading["layers"],
        "read_width": reading["width"],
        "language_batch": reading["batch"],
        "read": record.probes["language model"]["captions read"],
        "channels": ", ".join(map(str, vae["channels"])),
        "vae_batch": vae["batch"],
        "dit_layers": dit["layers"],
        "dit_width": dit["heads"] * dit["head_width"],
        "dit_batch": dit["batch"],
        "no_class": dit["no_class"],
    }
