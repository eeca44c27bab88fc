"""Free memory of a CPU is the least that any limit leaves: the system's, the control groups' of both versions."""

import resource
import subprocess
import sys

import pytest
import torch

from stages.free_memory import _group_limits, free_memory

GIB = 2**30


def group(folder, names, *, limit, usage, inactive):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {inactive}\n")


V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("memory.max", "memory.current", "inactive_file")


@pytest.mark.parametrize(
    ("line", "root", "names"), [("0::/jobs/one", "", V2), ("4:cpu,memory:/jobs/one", "memory", V1)], ids=["v2", "v1"]
)
def test_a_group_and_those_above_it_leave_what_is_not_used_and_what_files_give_back(tmp_path, line, root, names):
    group(tmp_path / root / "jobs", names, limit=8 * GIB, usage=5 * GIB, inactive=GIB)
    group(tmp_path / root / "jobs" / "one", names, limit=3 * GIB, usage=GIB, inactive=0)
    group(tmp_path / root, names, limit="max" if names is V2 else 2**62, usage=0, inactive=0)
    found = sorted(_group_limits(f"9:cpuset:/other\n{line}\n", tmp_path))
    assert found[:2] == [2 * GIB, 4 * GIB]
    assert all(one >= 2**62 for one in found[2:])


def test_in_a_container_that_shows_the_hosts_path_the_folder_itself_counts(tmp_path):
    group(tmp_path, V2, limit=GIB, usage=GIB // 4, inactive=0)
    assert list(_group_limits("0::/somewhere/on/the/host\n", tmp_path)) == [GIB - GIB // 4]


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of address space is Linux's")
def test_a_limit_of_address_space_counts():
    code = "import torch; from stages.free_memory import free_memory; print(free_memory(torch.device('cpu')))"
    most = 16 * GIB
    limited = subprocess.run(
        [sys.executable, "-c", code],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (most, most)),
        capture_output=True,
        text=True,
        check=True,
    )
    assert 0 < int(limited.stdout) < min(most, free_memory(torch.device("cpu")) + most // 2)
