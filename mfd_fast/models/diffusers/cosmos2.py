"""Cosmos-Predict2, text to image: a flow told t that begins at t = 80/81, v_c + s (v_c - v_u).

Outside the network the pipeline has EDM's x_sigma = data + sigma noise and derivatives in sigma.
With t = sigma / (1 + sigma) that is x_t / (1 - t), and a step in sigma is the same step in t.
"""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mfd_fast.models.diffusers.constants import TABLE, Constant, keys_values
from mfd_fast.models.diffusers.family import Cond, Family, by_channel
from mfd_fast.models.diffusers.record import Recording, Step


class Cosmos2(Family):
    """cond: ``text [B, 512, C]``, 0 behind the text and attended; the null prompt is a long
    sentence.

    The pipeline refuses prompts and blackens images by its safety checker, and so does this.  It
    has no LoRA loader: ``pipe.transformer.load_lora_adapter`` takes the file.
    """

    comfyui: ClassVar = None
    text_length: ClassVar = 512
    rounding: ClassVar = 81 * torch.finfo(torch.float32).eps  # 1 + sigma of the first step

    def __init__(self, pipe: Any, **options: Any):
        super().__init__(pipe, **options)
        self.before()
        if self.config.in_channels != self.config.out_channels:
            raise ValueError(
                "this Cosmos network starts from a video, which no adapter takes: give the "
                "checkpoint of text to image (Text2Image)"
            )

    @classmethod
    def before(cls) -> None:
        """Its network resizes a mask, which is 0 here, by torchvision."""
        from diffusers.models.transformers import transformer_cosmos as module

        if not hasattr(module, "transforms"):
            resize = SimpleNamespace(resize=lambda x, size, interpolation: x.new_zeros(1, 1, *size))
            mode = SimpleNamespace(NEAREST=None)
            module.transforms = SimpleNamespace(functional=resize, InterpolationMode=mode)

    def default_size(self) -> tuple[int, int]:
        return self.default("height"), self.default("width")

    def unit(self) -> int:
        return self.pipe.vae_scale_factor_spatial * self.patch

    @property
    def guidance(self) -> float:
        return 1.0 + float(self.scale) if self.scale > 1 else 1.0

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """``[C, 1, h, w]``."""
        return self.config.in_channels, 1, self.rows * self.patch, self.columns * self.patch

    def encode_text(self, prompts: list[str]) -> Cond:
        for prompt in prompts:
            if not self.pipe.safety_checker.check_text_safety(prompt):
                raise ValueError(
                    f"the safety checker of {type(self.pipe).__name__} refuses the prompt "
                    f"{prompt!r}: leave it out"
                )
        return {"text": self._encoded(prompts, is_guided=False)[0]}

    @torch.no_grad()
    def encode_null(self) -> Cond:
        return {"text": self._encoded([""], is_guided=True)[1]}

    def _encoded(self, prompts: list[str], *, is_guided: bool) -> tuple[Tensor, Tensor | None]:
        length = self.default("max_sequence_length")
        return self.pipe.encode_prompt(prompts, None, is_guided, max_sequence_length=length)

    def blank(self, rows: int) -> Cond:
        return {"text": self.zeros(rows, self.text_length, self.config.text_embed_dim)}

    def constants(self, transformer: Any) -> Iterator[Constant]:
        yield Constant(TABLE, ("rope",))
        blocks = transformer.transformer_blocks
        yield from keys_values(blocks, "transformer_blocks", "text", self.tokens, is_normed=False)

    def velocity(self, transformer: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return transformer(
            hidden_states=x,
            timestep=t.to(x.dtype),
            encoder_hidden_states=cond["text"].to(x.dtype),
            padding_mask=x.new_zeros(1, 1, self.height, self.width),
            return_dict=False,
        )[0]

    def as_flow(self, recording: Recording) -> Recording:
        """Without the last evaluation, where it is one at the last sigma and moves nothing."""
        sigmas, steps = recording.nodes, recording.steps
        if sigmas[-1] == sigmas[-2]:
            sigmas, steps = sigmas[:-1], steps[:-1]
        recording.nodes = tuple(sigma / (1 + sigma) for sigma in sigmas)
        recording.start = recording.nodes[0]
        recording.steps = [_of_flow(step) for step in steps]
        return recording

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        vae, checker = self.pipe.vae, self.pipe.safety_checker
        x = by_channel(x, vae.config).to(vae.dtype)
        image = vae.decode(x, return_dict=False)[0]
        made = self.pipe.video_processor.postprocess_video(image, output_type="pt")[:, 0]
        if not hasattr(checker, "check_video_safety"):  # no pipeline, its parts alone
            return made
        images = (made.movedim(1, -1)[:, None] * 255).byte().cpu().numpy()
        checked = [torch.tensor(checker.check_video_safety(one)[0]) for one in images]
        return torch.stack(checked).to(made).movedim(-1, 1) / 255


def _of_flow(step: Step) -> Step:
    """With dx/dsigma = x_t + (1 - t) v at x_t = (1 - t) x_sigma; the next sample stays."""
    sigma = step.time
    x = step.sample / (1 + sigma)
    v = (step.output - x) * (1 + sigma)
    return step._replace(output=v, time=sigma / (1 + sigma), sample=x)
