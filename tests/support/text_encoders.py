"""Small text encoders: a fake that is fast, and a random Gemma in a checkpoint's folders."""

import json
from inspect import signature

import torch

from mfd_fast.models.sana.text.prompts import open_prompts

WORDS = ["red", "fox", "cat", "a", "the", "on", "snow", "under", "stars", "painting"]
GEMMA = {
    **{"vocab_size": 700, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 12},
}


class FakeEncoder:
    """Random numbers that depend on the prompt and, like a real encoder's, on its batch."""

    dim, max_length = 6, 9

    def __init__(self, seed=0):
        self.seed, self.calls = seed, []

    def describe(self):
        return {"dim": self.dim, "checkpoint": "fake"}

    def encode(self, prompts):
        self.calls.append(list(prompts))
        texts = [self.tokens(prompt, len(prompts)) for prompt in prompts]
        lengths = torch.tensor([len(text) for text in texts])
        padded = torch.nn.utils.rnn.pad_sequence([*texts, torch.zeros(self.max_length, self.dim)])
        return padded.transpose(0, 1)[:-1], torch.arange(self.max_length) < lengths[:, None]

    def tokens(self, prompt, batch):
        generator = torch.Generator().manual_seed(self.seed + batch + sum(prompt.encode()))
        return torch.randn(1 + len(prompt) % self.max_length, self.dim, generator=generator)

    def null(self):
        return self.tokens("", 0)


def make_prompts(path, count):
    """``count`` different prompts of 2 to 9 words."""
    generator = torch.Generator().manual_seed(0)
    lines = []
    for number in range(count):
        size = int(torch.randint(2, 10, (), generator=generator))
        picks = torch.randint(len(WORDS), (size,), generator=generator).tolist()
        lines.append(" ".join([*(WORDS[pick] for pick in picks), str(number)]))
    path.write_text("\n".join(lines))
    return open_prompts(path)


def learn_pieces(texts):
    """Vocabulary and merges of a small tokenizer of Gemma's kind: bytes for what it never saw."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.normalizers import Replace
    from tokenizers.pre_tokenizers import Split
    from tokenizers.trainers import BpeTrainer

    learner = Tokenizer(BPE(unk_token="<unk>", byte_fallback=True))
    learner.normalizer = Replace(" ", "▁")
    learner.pre_tokenizer = Split(" ", "merged_with_previous")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    special += [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = BpeTrainer(vocab_size=GEMMA["vocab_size"], special_tokens=special)
    learner.train_from_iterator(texts, trainer)
    model = json.loads(learner.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def save_gemma(folder, **options):
    """``tokenizer/`` and ``text_encoder/`` as in a SANA checkpoint, with random weights."""
    from diffusers import SanaPipeline
    from tokenizers.processors import TemplateProcessing
    from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

    instruction = signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    vocab, merges = learn_pieces(instruction + WORDS)
    tokenizer = GemmaTokenizer(vocab=vocab, merges=merges)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocab["<bos>"])]
    )
    model = Gemma2Model(Gemma2Config(**GEMMA))
    pipeline = SanaPipeline(tokenizer, model, None, None, None)
    pipeline.save_pretrained(folder, **options)
    return folder
