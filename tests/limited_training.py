"""A training in a process that may take so many bytes more than it has once its networks are loaded.

python -m tests.limited_training WORLD NAME BYTES key=value ...
"""

import os
import resource
import sys
from pathlib import Path

from pipeline.runs import training
from pipeline.settings import locations
from pipeline.settings.config import resolve
from tests.training_world import SETTINGS, World


def main(folder, name, more_bytes, *settings):
    world = World(Path(folder))
    os.chdir(world.folder)
    options = {
        "data.dataset": str(world.folder / "card.yaml"),
        "data.annotations": str(world.folder),
        "cache.root": str(world.cache),
        "run.name": name,
    }
    config = resolve(preset="tiny", options=options, overrides=[*SETTINGS, *settings]).config
    path = locations.run_folder(config)
    trainer, loaded, stamp = training.prepare_training(config, path, bool)
    training.begin(path, config, loaded, stamp, resume=False)
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmSize:"))
    most = 1024 * int(line.split()[1]) + int(more_bytes)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    trainer.fit(lambda _row: None)


if __name__ == "__main__":
    main(*sys.argv[1:])
