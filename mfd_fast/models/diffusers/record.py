"""A pipeline's own denoising loop, watched: its calls, its schedule, what it hands the scheduler.

With a stub in place of the network nothing is evaluated, so a watched call costs next to nothing at
any size: that is how the schedule of a pipeline is asked for, and how it is probed.
"""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mfd_fast.flow.times import Schedule
from mfd_fast.models.diffusers.family import Cond, Family


class Step(NamedTuple):
    """What one step handed to ``scheduler.step`` (as a velocity of ours), what came back, and the
    network's calls.
    """

    output: Tensor
    time: float
    sample: Tensor
    next_sample: Tensor
    calls: list[dict[str, Any]]


@dataclass
class Recording:
    """One call of a pipeline: its steps and the nodes that its scheduler had made."""

    steps: list[Step] = field(default_factory=list)
    nodes: tuple[float, ...] = ()
    start: float = 1.0

    @property
    def schedule(self) -> Schedule:
        """The nodes that the states visit and the times that the network was shown."""
        return Schedule(self.nodes, tuple(step.time for step in self.steps), self.start)

    @property
    def end(self) -> Tensor:
        """The last sample ``[B, *S]``, before the pipeline unpacks or scales it."""
        return self.steps[-1].next_sample


def record(
    family: Family, cond: Cond, noise: Tensor, steps: int, *, stub: bool = True, **call: Any
) -> Recording:
    """Run the family's pipeline for the prompts of cond from noise ``[B, *S]``, and watch.

    Args:
        stub: answer in place of the network (:func:`answer`).
        call: further arguments of the pipeline's call.
    """
    null = family.null(cond) if family.has_null else None
    arguments = family.call(cond, null) | call
    with family.given(cond, null):
        return record_call(family, noise, steps, stub=stub, **arguments)


def record_call(
    family: Family, noise: Tensor, steps: int, *, stub: bool = False, **arguments: Any
) -> Recording:
    """:func:`record` with arguments of the user's own, such as ``prompt``."""
    pipe, made = family.pipe, Recording()
    calls: list[dict[str, Any]] = []
    step, scale = pipe.scheduler.step, float(pipe.scheduler.config.num_train_timesteps)
    # Whether its clock runs up to the data, and the velocity with it.
    is_inverted = pipe.scheduler.config.get("invert_sigmas", False)

    def watched_step(output: Tensor, t: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = step(output, t, sample, *args, **kwargs)
        after = result[0] if isinstance(result, tuple) else result.prev_sample
        time, v = family.time_of(float(t) / scale), output
        if is_inverted:
            time, v = 1.0 - time, -output
        made.steps.append(Step(v, time, sample.clone(), after, calls.copy()))
        calls.clear()
        return result

    with (
        watched(family.networks, calls, stub=stub),
        replaced(pipe.scheduler, "step", watched_step),
        replaced(pipe, "_progress_bar_config", {"disable": True}),
        torch.no_grad(),
    ):
        pipe(
            height=family.height,
            width=family.width,
            num_inference_steps=steps,
            latents=family.pipe_latents(noise),
            output_type="latent",
            **arguments,
        )
    sigmas = pipe.scheduler.sigmas.double()
    made.nodes = tuple((1.0 - sigmas if is_inverted else sigmas).tolist())
    return family.as_flow(made)


@contextmanager
def watched(networks: dict[str, Any], calls: list[dict[str, Any]], *, stub: bool) -> Iterator[None]:
    """Inside the block every call of a network adds its arguments by name to ``calls``, and which
    of several it was.
    """

    def watching(name: str, forward: Any) -> Any:
        signature = inspect.signature(forward)

        def call(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            calls.append(dict(bound.arguments) | ({"network": name} if len(networks) > 1 else {}))
            first, sample = next(iter(bound.arguments.items()))
            if isinstance(sample, Tensor):
                calls[-1][first] = sample.clone()  # a pipeline may step in place
            if not stub:
                return forward(*args, **kwargs)
            made = answer(bound.arguments)
            if bound.arguments.get("return_dict"):  # Kandinsky 5, whose sample has more channels
                return SimpleNamespace(sample=made[..., : networks[name].config.out_visual_dim])
            return (made,)

        return call

    with ExitStack() as stack:
        for name, network in networks.items():
            stack.enter_context(replaced(network, "forward", watching(name, network.forward)))
        yield


def answer(arguments: dict[str, Any]) -> Any:
    """What the stub answers: the sample times a number of each row's text, as the network would
    hand it out (a list for a list).
    """
    sample, text = next(iter(arguments.values())), _text(arguments)
    gains = [1.5 + torch.sin(row.double().sum()) for row in text]
    rows = [row * gain.to(row.dtype) for row, gain in zip(sample, gains, strict=True)]
    return rows if isinstance(sample, list) else torch.stack(rows)


def _text(arguments: dict[str, Any]) -> Any:
    """The rows of the text: the first argument named after them."""
    for name, value in arguments.items():
        if (
            name.startswith(("encoder_hidden_states", "cap_feats", "input_ids"))
            and value is not None
        ):
            return value
    raise ValueError(f"the network takes no text; its arguments are {sorted(arguments)}")


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside the block the instance's attribute is ``value``; what was there comes back."""
    before = vars(owner).get(name, inspect)  # inspect: nothing was there
    vars(owner)[name] = value
    try:
        yield
    finally:
        if before is inspect:
            del vars(owner)[name]
        else:
            vars(owner)[name] = before
