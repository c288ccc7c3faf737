"""A SANA checkpoint with random weights and every folder of a real one, a few megabytes.

For the ``sana-tiny`` preset and the tests: what loads it loads a real checkpoint.
"""

from pathlib import Path

import torch

TRANSFORMER = {
    **{"in_channels": 4, "out_channels": 4, "num_layers": 2, "sample_size": 8, "patch_size": 1},
    **{"num_attention_heads": 2, "attention_head_dim": 32, "cross_attention_dim": 64},
    **{"num_cross_attention_heads": 2, "cross_attention_head_dim": 32, "caption_channels": 32},
}
TEXT = {
    **{"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16},
}
VAE = {
    "latent_channels": TRANSFORMER["in_channels"],
    "encoder_block_types": ("ResBlock",) * 3,
    "decoder_block_types": ("ResBlock",) * 3,
    "encoder_block_out_channels": (8, 8, 16),
    "decoder_block_out_channels": (8, 8, 16),
    "encoder_layers_per_block": (1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1),
    "encoder_qkv_multiscales": ((), (), ()),
    "decoder_qkv_multiscales": ((), (), ()),
    "upsample_block_type": "interpolate",
    "downsample_block_type": "conv",
    "scaling_factor": 0.41407,
}
SCHEDULER = {
    **{"algorithm_type": "dpmsolver++", "solver_order": 2, "prediction_type": "flow_prediction"},
    **{"use_flow_sigmas": True, "flow_shift": 3.0, "num_train_timesteps": 1000},
}


def make_tiny_checkpoint(folder: str | Path, *, seed: int = 0) -> Path:
    """Write ``transformer vae text_encoder tokenizer scheduler model_index.json`` into ``folder``.

    ``ImportError`` without diffusers and transformers.
    """
    from diffusers import (
        AutoencoderDC,
        DPMSolverMultistepScheduler,
        SanaPipeline,
        SanaTransformer2DModel,
    )
    from transformers import Gemma2Config, Gemma2Model

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipeline = SanaPipeline(
            tokenizer=byte_tokenizer(),
            text_encoder=Gemma2Model(Gemma2Config(**TEXT)).eval(),
            vae=AutoencoderDC(**VAE).eval(),
            transformer=SanaTransformer2DModel(**TRANSFORMER).eval(),
            scheduler=DPMSolverMultistepScheduler(**SCHEDULER),
        )
    pipeline.save_pretrained(str(folder))
    return Path(folder)


def byte_tokenizer():
    """A tokenizer of bytes with Gemma's special tokens: <bos> in front, <pad> to the right."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
    )
