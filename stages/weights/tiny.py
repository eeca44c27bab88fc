"""Where the tiny frozen networks are that come with the project, in the layouts of the published checkpoints.

They let the whole path run on any machine without a download, through the same classes and the same loading code as the
published weights. `bundled:tiny-instructblip` holds a vision tower, an untrained Q-Former to start from, a LLaMA
language model and both tokenizers; `bundled:tiny-dit` a DiT pipeline. The card beside each and
recipes/small_world/README.md describe how they were trained, and how well they know the synthetic world.
"""

from pathlib import Path

from stages.errors import UserError

BUNDLED = Path(__file__).with_name("bundled")


def bundled_folder(name: str) -> Path:
    """Return the folder of a bundled network.

    Raises:
        UserError: no network of that name is bundled.
    """
    names = sorted(path.name for path in BUNDLED.iterdir() if path.is_dir())
    if name not in names:
        raise UserError("unknown bundled network", received=name, allowed=", ".join(names))
    return BUNDLED / name
