"""The small SANA of the benchmarks, for code that must run without diffusers.

``bench.sana_sizes`` has the same sizes as diffusers' model (``tests/test_bench_step.py``).
"""

CONFIG = {
    **{"num_layers": 8, "num_attention_heads": 16, "attention_head_dim": 32},
    **{"num_cross_attention_heads": 8, "cross_attention_head_dim": 64},
    **{"caption_channels": 512, "sample_size": 16},
}
TEXT = 60  # tokens of a prompt without its padding
