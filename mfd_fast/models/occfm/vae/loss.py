"""What OccFM's VAEs are trained on: cross entropy, Lovasz-softmax, and a term on the latents.

The Lovasz-softmax loss is Berman, Triki, Blaschko, arXiv 1705.08790, equation 11, over the classes
that occur, with all voxels of the batch together.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mfd_fast.models.occfm.vae.vae import OccupancyVae, draw

CROSS_ENTROPY_WEIGHT = 10.0


class VaeLoss(NamedTuple):
    """Scalars; ``total`` is the weighted sum that is minimised."""

    total: Tensor
    cross_entropy: Tensor
    lovasz: Tensor
    latent: Tensor


def latent_penalty(mean: Tensor, deviation: Tensor) -> Tensor:
    """``-0.5 (1 + s - mean^2 - exp(s))`` with the standard deviation s, averaged.

    A KL divergence to N(0, 1) would have the log-variance for s.  The published VAEs were trained
    with the deviation there, which drives it to zero instead of one: their latents are small and
    nearly noise-free, and are scaled by 10 before they meet unit noise.
    """
    return -0.5 * (1 + deviation - mean.square() - deviation.exp()).mean()


def lovasz_softmax(probabilities: Tensor, ids: Tensor) -> Tensor:
    """The Lovasz extension of 1 - IoU, averaged over the classes that occur in ``ids``.

    Args:
        probabilities: ``[N, K]``, rows sum to one.
        ids: class ids ``[N]``.
    """
    losses, present = [], []
    for class_id in range(probabilities.shape[1]):
        is_class = (ids == class_id).to(probabilities.dtype)
        errors, order = (is_class - probabilities[:, class_id]).abs().sort(descending=True)
        losses.append(errors @ _jaccard_steps(is_class[order]))
        present.append(is_class.amax())
    present = torch.stack(present)
    return (torch.stack(losses) * present).sum() / present.sum()


def _jaccard_steps(is_class: Tensor) -> Tensor:
    """By how much each further error raises 1 - IoU, ``[N]``, largest errors first."""
    total, hits = is_class.sum(), is_class.cumsum(0)
    union = total + (1 - is_class).cumsum(0)
    jaccard = 1 - (total - hits) / union
    return torch.cat([jaccard[:1], jaccard.diff()])


def vae_loss(
    vae: OccupancyVae, ids: Tensor, *, generator: torch.Generator | None = None
) -> VaeLoss:
    """10 cross entropy + Lovasz-softmax + the latent term, of one draw of the latents of ``ids``.

    Args:
        vae: in training; the class table is trained through the encoder only.
        ids: class ids ``[B, X, Y, Z]``, int64.
        generator: of the draw.
    """
    mean, deviation = vae.moments(ids)
    scores = vae.decode(draw(mean, deviation, generator=generator)).flatten(0, 3)
    ids = ids.flatten()
    cross_entropy = F.cross_entropy(scores, ids)
    lovasz = lovasz_softmax(scores.softmax(dim=-1), ids)
    latent = latent_penalty(mean, deviation)
    return VaeLoss(
        CROSS_ENTROPY_WEIGHT * cross_entropy + lovasz + latent, cross_entropy, lovasz, latent
    )
