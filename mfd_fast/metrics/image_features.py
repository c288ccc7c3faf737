"""Features of images for the Frechet distance: DINOv2's or Inception's.

The paper takes DINOv2 features (Oquab et al., 2024) and compares a student with samples of its
teacher (section 5.2); it does not say which size.  The feature is the class token after the last
norm.  ``frechet_distance`` and ``precision_recall`` take the rest.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mfd_fast.files.whole import first_line
from mfd_fast.metrics.frechet import frechet_distance
from mfd_fast.metrics.manifold import precision_recall
from mfd_fast.metrics.pretrained import (
    ImageProcessor,
    check_images,
    in_batches,
    load_network,
    model_folder,
    read_config,
)

Features = Callable[[Tensor], Tensor]  # uint8 images [N, 3, H, W] -> float32 [N, D] on the CPU
INSTALL = "Inception features need torchmetrics and torch-fidelity: pip install torchmetrics[image]"


class DinoFeatures:
    """DINOv2 class tokens ``[N, D]`` of uint8 images ``[N, 3, H, W]``.

    Args:
        model: folder or hub id in the layout of ``facebook/dinov2-large``.
        device: where features are computed; the weights are there only during a call.

    ``OSError`` or ``ValueError`` names a model that is missing or of another kind.
    """

    def __init__(self, model: str, *, device: torch.device | str = "cpu"):
        folder = model_folder(model)
        self.device = torch.device(device)
        self._prepare = ImageProcessor(folder)
        config = read_config(folder, ("dinov2", "dinov2_with_registers"))
        self._network = load_network("AutoModel", config, folder)
        self.size = int(self._network.config.hidden_size)

    def __call__(self, images: Tensor) -> Tensor:
        check_images(images)
        return in_batches(self._tokens, self._network, self.device, images)

    def _tokens(self, images: Tensor) -> Tensor:
        return self._network(self._prepare(images).to(self.device)).last_hidden_state[:, 0]


class InceptionFeatures:
    """Pooled features ``[N, 2048]`` of the Inception network of FID, by torchmetrics.

    Args:
        file: ``weights-inception-2015-12-05-6726825d.pth`` of torch-fidelity.
        device: as for :class:`DinoFeatures`.

    Raises:
        ImportError: says what to install.
        FileNotFoundError: there is no such file.
        ValueError: it holds other weights.
    """

    size = 2048

    def __init__(self, file: str | Path, *, device: torch.device | str = "cpu"):
        try:
            import torch_fidelity  # noqa: F401
            from torchmetrics.image.fid import NoTrainInceptionV3
        except ImportError as error:
            raise ImportError(INSTALL) from error
        if not Path(file).is_file():
            raise FileNotFoundError(
                f"there is no file {file}; Inception's weights are "
                "weights-inception-2015-12-05-6726825d.pth of the torch-fidelity releases"
            )
        self.device = torch.device(device)
        try:
            self._network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(file))
        except Exception as error:  # unpickling and load_state_dict raise many kinds
            raise ValueError(
                f"{file} does not hold the weights of FID's Inception ({first_line(error)})"
            ) from error

    def __call__(self, images: Tensor) -> Tensor:
        check_images(images)
        return in_batches(
            lambda rows: self._network(rows.to(self.device)), self._network, self.device, images
        )


FEATURES: dict[str, Callable[..., Features]] = {
    "dinov2": DinoFeatures,
    "inception": InceptionFeatures,
}
"""Name -> what loads the features: ``FEATURES[name](model_or_file, device=...)``."""


def few_samples(num: int, size: int, k: int = 3) -> list[str]:
    """What ``num`` samples with features of ``size`` values cannot tell: nothing, or a sentence.

    A covariance of N samples has rank N - 1 at most, so with N <= size the Frechet distance
    compares two that are singular; and balls that reach the k-th of a few neighbours cover
    everything.  ``ValueError`` if there is no k-th neighbour.
    """
    if num <= k:
        raise ValueError(
            f"num_eval_samples must be above {k}, for precision and recall look at the {k} nearest "
            f"neighbours; got {num}"
        )
    more = f"--num-eval-samples {10 * size} (mfd-fast evaluate RUN --num-samples {10 * size})"
    if num > 10 * size:
        return []
    if num > size:
        return [
            f"Frechet distances of {num} samples with {size} components are too large; compare "
            f"rows of this table alone, or take {more}"
        ]
    return [
        f"{num} samples are fewer than the {size} components of a feature: the Frechet distances "
        f"are mostly noise, and recall near 1 means nothing; compare with {more}"
    ]


def distribution_scores(reference: Tensor, generated: Tensor, k: int = 3) -> dict[str, float]:
    """``fid``, ``precision`` and ``recall`` of generated samples, on their features.

    Args:
        reference: features of data, or of the teacher's samples, ``[N, D]``.
        generated: features of what is judged, ``[M, D]``.
        k: the neighbour that sets the manifolds' radii.

    ``ValueError``: fewer than two samples, or no k-th neighbour.
    """
    inside = precision_recall(reference, generated, k)
    return {"fid": frechet_distance(reference, generated), **inside._asdict()}
