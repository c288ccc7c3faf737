"""``mfd-fast info``: versions, devices, and how the compiled operators were built."""

import sys

from mfd_fast.cli.options import no_more

NOT_COMPILED = (
    "none, the PyTorch references run in their place; install a C++ compiler (apt-get install g++) "
    "and repeat pip install --no-build-isolation --force-reinstall --no-deps ."
)


def info(argv: list[str]) -> None:
    """Print what is installed and what it runs on."""
    no_more(argv)
    import torch

    from mfd_fast import __version__
    from mfd_fast.ops.extension import backend, build_info

    built = build_info()
    print(f"mfd-fast {__version__}, torch {torch.__version__}, python {sys.version.split()[0]}")
    print(f"operators: MFD_FAST_BACKEND={backend()}")
    print(f"compiled operators: {built or NOT_COMPILED}")
    if torch.cuda.is_available():
        print(f"device: {torch.cuda.get_device_name()}")
    else:
        print(f"device: CPU, {torch.get_num_threads()} threads; no NVIDIA GPU is visible")
