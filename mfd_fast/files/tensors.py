"""Files of named tensors that others made, and small heads whose weights they hold."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mfd_fast.files.torch_pickles import load_torch_file
from mfd_fast.files.whole import first_line

WRAPPERS = ("state_dict", "model")  # what trainers put around the weights


def read_tensors(file: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of one that ``torch.save`` wrote, by name.

    A file of torch runs no code (:mod:`mfd_fast.files.torch_pickles`).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is broken, or holds something else than tensors.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"there is no weights file {file}; check the path")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is broken ({first_line(error)}); copy it again") from error
    content = load_torch_file(file)
    for key in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"expected tensors by name in {file}, got other things; name another file")
    return content


class ScoreHead(nn.Module):
    """Five linear layers without activations, ``[N, width] -> [N]``.

    The head of the LAION aesthetic predictor and of ImageReward, under the names of their files.
    """

    def __init__(self, width: int):
        super().__init__()
        sizes = ((width, 1024), (1024, 128), (128, 64), (64, 16), (16, 1))
        layers = dict(zip("02467", (nn.Linear(*size) for size in sizes), strict=True))
        self.layers = nn.ModuleDict(layers)  # the numbers between are of dropout

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x[:, 0]


def load_head(tensors: Mapping[str, Tensor], width: int, file: str | Path) -> ScoreHead:
    """A head with ``tensors``; ``ValueError`` if they are others, or for another width."""
    head = ScoreHead(width)
    try:
        head.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(
            f"the tensors in {file} are not those of a score head on embeddings of width {width} "
            f"({str(error).splitlines()[1].strip()}); name another file or model"
        ) from error
    return head.float().eval().requires_grad_(False)
