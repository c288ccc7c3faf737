"""Commands outside this tree, and pip without a network."""

import os
import subprocess
import sys

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
OFFLINE = ["--no-index", "--no-deps"]


def run(*command, cwd, **environment):
    """The finished command; nothing of this tree is on its path."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": "", **environment}
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True
    )


def must(done):
    """What it printed, if it ended well."""
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
