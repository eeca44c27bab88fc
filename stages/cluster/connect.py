"""Connecting to a Ray cluster, or starting one on this machine, and leaving it."""

import logging
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.exceptions import AuthenticationError
from ray.job_config import JobConfig

from stages import own_code
from stages.errors import UserError

SHOWN_CHARS = 160


_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


_CONNECT_LIMIT_S = 10.0
# Most of it may go by while a busy machine imports Ray.
_CHECK_LIMIT_S = 30.0


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Connect to a Ray cluster, or start one on this machine for the time of the block.

    Without an address the one in `RAY_ADDRESS` counts, and never a cluster that happens to run on this machine.

    Raises:
        UserError: the cluster does not answer, or wants a token that it is not given.
    """
    # Ray would run its workers at low priority (nice 15); an actor that feeds a GPU must not starve beside other work.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Without a GPU the networks' threads share their cores with decode children, whom they must not keep waiting by
    # spinning; libgomp reads this when a worker starts.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    chosen = address or os.environ.get("RAY_ADDRESS") or "local"
    os.environ.update(own_code.environment())
    _require_answer(chosen)
    try:
        _connect(chosen)
        yield
    finally:
        ray.shutdown()


def _connect(address: str) -> None:
    # Ray would put the working directory first on its workers' path, unless it takes the driver for a client's. The
    # folder of this code is what they need of the driver's path, where their node has it.
    ours = JobConfig(_client_job=True, _py_driver_sys_path=[str(own_code.ROOT)])
    job = {} if "://" in address else {"job_config": ours}
    try:
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR, **job)
    except AuthenticationError as error:
        raise _no_token(address) from error
    except (ConnectionError, ValueError) as error:
        raise _no_cluster(address, error) from error


def _require_answer(address: str) -> None:
    """UserError at once where no cluster is at host:port, or it wants a token; Ray itself would try for long."""
    host, _, port = address.rpartition(":")
    if "://" in address or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_LIMIT_S).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, error) from error
    # A process of its own: with tokens switched on and none to be found, Ray aborts the one that asks.
    check = (sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address)
    try:
        done = subprocess.run(check, capture_output=True, text=True, timeout=_CHECK_LIMIT_S, check=False)  # noqa: S603
    except subprocess.TimeoutExpired as error:
        raise _no_cluster(address, f"what is there does not answer within {_CHECK_LIMIT_S:g} s") from error
    if "uthentication token" in done.stderr:
        raise _no_token(address)
    if done.returncode:
        raise _no_cluster(address, done.stderr.strip().rpartition("\n")[2])


def _no_token(address: str) -> UserError:
    return UserError(
        "this Ray cluster wants a token and was not given its own",
        where="--address",
        received=address,
        hint="set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to what `ray get-auth-token` prints on the cluster's head "
        "(not needed where ~/.ray/auth_token is the same)",
    )


def _no_cluster(address: str, error: Exception | str) -> UserError:
    hint = "start one with `ray start --head`; if it was started with a token, set RAY_AUTH_MODE=token"
    return UserError(f"no Ray cluster: {error}", where="--address", received=address, hint=hint)


def last_line(error: BaseException) -> str:
    """What went wrong in another process: the last line of the trace that Ray passes on, without its colours."""
    lines = [line for line in _COLOUR.sub("", str(error)).splitlines() if line.strip()]
    user_error = f"{UserError.__module__}.{UserError.__qualname__}: "
    return lines[-1].strip().removeprefix(user_error) if lines else type(error).__name__
