"""A finished run for the tests of what is done with one, made once for each module of them."""

from tests.finished_run import cache, config, folder, run  # noqa: F401
