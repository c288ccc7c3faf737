"""Two nodes: network namespaces of this machine, joined by a virtual cable."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rank_worker import ELASTIC
from small_runs import make_backbone, run

from mfd_fast.run.checkpoint import checkpoints_in, read
from mfd_fast.testing.numerics import assert_as_accurate

SUPPORT = Path(__file__).parents[1] / "support"
PORT = 29431


def ip(*arguments):
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=30)


@pytest.fixture
def nodes():
    """Two names of namespaces with the addresses 10.231.7.1 and .2."""
    if os.name != "posix" or os.geteuid() or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the command ip (iproute2)")
    names = [f"mfd{os.getpid()}{side}" for side in "ab"]
    try:
        made = [ip("netns", "add", name) for name in names]
        pair = ("type", "veth", "peer", "name", names[1], "netns", names[1])
        made.append(ip("link", "add", names[0], "netns", names[0], *pair))
        if failed := [x.stderr.strip() for x in made if x.returncode]:
            pytest.skip(f"no network namespaces here: {failed[0]}")
        for i, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.231.7.{i + 1}/24", "dev", name)
            for link in ("lo", name):
                ip("-n", name, "link", "set", link, "up")
        yield names
    finally:
        for name in names:  # and the cable with them
            ip("netns", "del", name)


def launch(nodes, index, folder):
    """torchrun on a node, with one process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
    command += ["--nproc-per-node", "1", "--max-restarts", "3", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", f"10.231.7.1:{PORT}", "--rdzv-id", "two", "--rdzv-conf"]
    command += [f"is_host={1 - index},join_timeout=60,last_call_timeout=1"]
    command += ["--local-addr", f"10.231.7.{index + 1}"]
    env = {
        **os.environ,
        "PYTHONPATH": f"{SUPPORT}{os.pathsep}{SUPPORT.parents[1]}",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": nodes[index],
        # Else torchrun never tells a node that was launched again where the first one listens.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    worker = [str(SUPPORT / "rank_worker.py"), "nodes", str(folder)]
    return subprocess.Popen(["ip", "netns", "exec", nodes[index], *command, *worker], env=env)


def test_a_killed_node_is_launched_again_and_the_run_ends_as_in_one_process(nodes, tmp_path):
    first, second = (launch(nodes, index, tmp_path) for index in (0, 1))
    try:
        assert second.wait(60) == -9
        assert first.poll() is None
        second = launch(nodes, 1, tmp_path)
        assert (first.wait(60), second.wait(60)) == (0, 0)
    finally:
        for node in (first, second):
            if node.poll() is None:
                node.kill()
                node.wait(30)
    state = read(checkpoints_in(tmp_path)[-1])["distiller"]
    eager, exact = (
        run(tmp_path / str(dtype), **ELASTIC, backbone=make_backbone(dtype))[0].state_dict()
        for dtype in (torch.float32, torch.float64)
    )
    for name in ("aux", "student", "ema"):
        got, one, true = (torch.cat([p.flatten() for p in x[name]]) for x in (state, eager, exact))
        assert_as_accurate(got, one, true.double())
