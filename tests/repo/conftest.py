"""What pip makes of this tree, once for all tests here."""

import shutil
import sys
import tarfile
from pathlib import Path

import pytest
from installed import OFFLINE, PIP, must, run

ROOT = Path(__file__).resolve().parents[2]
LEFT = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "*.so", "__pycache__")


@pytest.fixture(scope="session")
def sdist(tmp_path_factory) -> Path:
    """The unpacked source distribution of a copy of this tree."""
    folder = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, folder / "tree", symlinks=True, ignore=LEFT)
    must(run(sys.executable, "setup.py", "-q", "sdist", "-d", folder, cwd=folder / "tree"))
    (archive,) = folder.glob("mfd_fast-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "unpacked", filter="data")
    shutil.rmtree(folder / "tree")
    (source,) = (folder / "unpacked").iterdir()
    return source


@pytest.fixture(scope="session")
def installed(sdist, tmp_path_factory) -> Path:
    """A folder with what the wheel of the sdist installs, without compiled operators: `make test`
    has compiled the same files, and they are a minute.
    """
    folder = tmp_path_factory.mktemp("wheel")
    options = [*OFFLINE, "--no-build-isolation", "-w", folder]
    must(run(*PIP, "wheel", *options, sdist, cwd=folder, MFD_FAST_NO_EXT="1"))
    (wheel,) = folder.glob("mfd_fast-*.whl")
    must(run(*PIP, "install", *OFFLINE, "--target", folder / "site", wheel, cwd=folder))
    return folder / "site"
