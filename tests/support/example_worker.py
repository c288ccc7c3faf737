"""What every process of an example runs: python example_worker.py EXAMPLE FOLDER OPTIONS.

OPTIONS are the keyword arguments of its ``main``, in JSON; what that returns goes to
FOLDER/RANK.safetensors.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

from safetensors.torch import save_file


def load(path):
    """The example as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tensors(result):
    """The tensors of a network, or of a dictionary of them."""
    state = result if isinstance(result, dict) else result.state_dict()
    return {name: tensor.detach().clone() for name, tensor in state.items()}


if __name__ == "__main__":
    example, folder, options = sys.argv[1:]
    result = tensors(load(example).main(**json.loads(options)))
    save_file(result, Path(folder) / f"{os.environ['RANK']}.safetensors")
