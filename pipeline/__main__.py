"""The `pipeline` command, also as `python -m pipeline`: before anything else is imported it is ready to be stopped."""

import os
import sys


def main() -> None:
    """Run the command line of this process."""
    # `python -m` looks into the working directory first, where a person may have a ray.py or a pathlib.py of their own.
    if sys.path[0] == os.getcwd() != os.path.dirname(os.path.dirname(__file__)):  # noqa: PTH109, PTH120
        del sys.path[0]
    from stages.signals import run

    run(_command_line)


def _command_line() -> None:
    from pipeline.cli import main as command_line
    from stages import own_code

    os.environ.update(own_code.environment())
    command_line()


if __name__ == "__main__":
    main()
