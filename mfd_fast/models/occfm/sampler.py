"""Forecasts by OccFM's own sampler: shifted Euler steps with guidance, from noise to latents."""

from collections.abc import Mapping

import torch
from torch import Tensor

from mfd_fast.flow.integrate import integrate
from mfd_fast.flow.solvers import scheduled
from mfd_fast.models.occfm.network import OccfmNetwork, null_condition


@torch.no_grad()
def forecast(
    network: OccfmNetwork,
    noise: Tensor,
    cond: Mapping[str, Tensor],
    *,
    steps: int | None = None,
    guidance: float | None = None,
) -> Tensor:
    """Latents of the future frames ``[B, F/2, C, H, W]``, as the VAE's decoder takes them.

    Args:
        noise: standard normal, like the result, float32.
        cond: history and trajectory of the windows (:class:`OccfmNetwork`).
        steps: ``config.sample_steps`` if None; 1 for a one-step student.
        guidance: ``config.guidance`` if None; 1 for a student, which needs one evaluation a step
            in place of two.
    """
    config = network.config
    guidance = config.guidance if guidance is None else guidance
    lanes = [cond] if guidance == 1.0 else [cond, null_condition(cond)]
    stacked = {key: torch.stack([lane[key] for lane in lanes], dim=1) for key in cond}
    prepared = network.prepare({key: rows.flatten(0, 1) for key, rows in stacked.items()})
    table = scheduled(network.schedule(steps), len(noise)).to(noise.device)
    modulations = iter(_modulations(network, table.times, prepared["trajectory_embedding"]))

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        times = t[:, None].expand(x.shape[:2]).flatten()
        rows = prepared | {"modulation": next(modulations)}
        return network(x.flatten(0, 1), times, rows).unflatten(0, x.shape[:2])

    ends = integrate(
        velocity,
        noise[:, None],
        table,
        guidance=guidance,
        num_lanes=len(lanes),
        dtype=network.dtype,
    )
    return ends[:, 0] / config.latent_scale


def _modulations(network: OccfmNetwork, times: Tensor, embedding: Tensor) -> Tensor:
    """The modulations of all steps ``[K, R, M]`` at times ``[K, B]``; R / B rows of a sample."""
    steps, rows = len(times), len(embedding)
    every_row = times.repeat_interleave(rows // times.shape[1], dim=1).flatten()
    return network.modulation(every_row, embedding.repeat(steps, 1)).unflatten(0, (steps, rows))
