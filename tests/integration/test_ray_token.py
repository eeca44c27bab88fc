"""A Ray cluster that wants a token: without one, the command says what to do in one line."""

import os
import socket
import subprocess
import sys

CONNECT = "from stages.cluster.connect import cluster\nwith cluster({address!r}): pass"


def test_switched_on_without_any_token_it_says_where_to_get_one(tmp_path):
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
        done = subprocess.run(
            [sys.executable, "-c", CONNECT.format(address=address)],
            env={**kept, "HOME": str(tmp_path), "RAY_AUTH_MODE": "token"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.stderr.splitlines()[-1].endswith(
        f"UserError: --address: this Ray cluster wants a token and was not given its own; got '{address}'. Set "
        "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to what `ray get-auth-token` prints on the cluster's head (not needed "
        "where ~/.ray/auth_token is the same)"
    ), done.stderr
