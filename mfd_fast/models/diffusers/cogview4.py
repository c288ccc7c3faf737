"""CogView4: told the time before its scheduler's shift; text padded left to 16 and attended."""

import math
from typing import Any, ClassVar

from torch import Tensor, nn, tensor

from mfd_fast.models.diffusers.family import Cond
from mfd_fast.models.diffusers.lengths import OwnLengths


class CogView4(OwnLengths):
    """cond: ``text [B, L, C]``, its padding to a multiple of 16 included, and ``length [B]``."""

    hands_sigmas: ClassVar = False
    comfyui: ClassVar = None
    text_length: ClassVar = 224
    null_length: ClassVar = 16

    def default_size(self) -> tuple[int, int]:
        return (self.config.sample_size * self.pipe.vae_scale_factor,) * 2

    def encode_alone(self, prompt: str) -> Cond:
        text, _ = self.pipe.encode_prompt(
            [prompt],
            do_classifier_free_guidance=False,
            max_sequence_length=self.default("max_sequence_length"),
        )
        return {"text": text, "length": tensor([text.shape[1]])}

    def blank_text(self, rows: int, length: int) -> Cond:
        text = self.zeros(rows, length, self.config.text_embed_dim)
        return {"text": text, "length": tensor([length] * rows)}

    @property
    def shift(self) -> float:
        """s of the scheduler's t = s / (s + 1 / u - 1), u the time that the network is told."""
        config, tokens = self.pipe.scheduler.config, self.rows * self.columns
        if not config.use_dynamic_shifting:
            return config.shift
        sides = math.sqrt(tokens / config.get("base_image_seq_len", 256))
        mu = config.get("max_shift", 0.75) * sides + config.get("base_shift", 0.25)
        return mu if config.time_shift_type == "linear" else math.exp(mu)

    def time_of(self, told: float) -> float:
        return self.shift / (self.shift + 1.0 / told - 1.0)

    def nodes_call(self, steps: int) -> dict[str, Any]:
        """Whole thousandths before the shift: the call rounds ``timesteps`` to them."""
        times = [round(1000 * node) for node in super().nodes_call(steps)["sigmas"]]
        return {"sigmas": [time / 1000 for time in times], "timesteps": times}

    def velocity_alone(self, transformer: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        size = cond["text"].new_tensor([[self.height, self.width]]).expand(len(x), -1)
        return transformer(
            hidden_states=x,
            encoder_hidden_states=cond["text"],
            timestep=1000 / (1 + self.shift * (1 / t - 1)),
            original_size=size,
            target_size=size,
            crop_coords=size.new_zeros(size.shape),
            return_dict=False,
        )[0]
