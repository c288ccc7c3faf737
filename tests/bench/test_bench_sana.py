"""The side-by-side benchmark of SANA runs, and both sides of it start from the same function."""

import dataclasses
import json

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")
from bench.results import record
from bench.running import Options
from bench.updates import literal, sana_literal
from bench.updates.sana_sizes import EMPTY_TOKENS, MAX_TOKENS, SIZES, Published
from mfd_fast.backbones.lanes import trajectory_lanes
from mfd_fast.models import preset
from mfd_fast.models.sana.text.trim import trim_text

TINY = SIZES["tiny"]


def test_both_sides_are_one_network():
    loop, prompt, null = literal.make_loop(TINY)
    ours = sana_literal.make_ours(loop, null, TINY.sample_shape, (80, 40))
    theirs = {
        key.replace(".base_layer", ""): value
        for key, value in loop.transformer.state_dict().items()
    }
    weights = ours.backbone.network.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in weights.items())
    cond = trim_text(prompt._asdict(), [TINY.prompt_tokens])
    rows = ours.backbone.prepare(cond).rows(trajectory_lanes(4.5), 1)
    assert all(kv.shape[:2] == (3, TINY.prompt_tokens) for kv in rows["keys_values"])
    real = (rows["bias"] == 0).flatten(1).sum(1)
    assert real.tolist() == [TINY.prompt_tokens, EMPTY_TOKENS, TINY.prompt_tokens]


def test_the_official_preset_is_the_literal_loops_settings():
    ours = preset("sana-1.6b-official")
    theirs = sana_literal.official_config(literal.OfficialSettings())
    differing = {
        field.name
        for field in dataclasses.fields(theirs)
        if getattr(theirs, field.name) != getattr(ours.distill, field.name)
    }
    assert differing == {"aux_updates", "student_updates"}  # the cycle, not one update
    assert (ours.sana.rank, ours.sana.alpha) == (64, 64.0)


def test_result_file(tmp_path):
    out, options = tmp_path / "result.json", Options(smoke=True)
    record(sana_literal.benchmark(options), options, out)
    result = json.loads(out.read_text())
    assert [(row["update"], row["impl"]) for row in result["rows"]] == [
        (update, impl) for update in ("aux", "student") for impl in ("literal", "ours")
    ]
    assert all(row["seconds_p10"] <= row["seconds"] <= row["seconds_p90"] for row in result["rows"])
    assert result["config"]["interval"] == [80, 40] and result["threads"] >= 1


def test_the_published_loop_encodes_and_decodes():
    torch.manual_seed(0)
    loop, _, _ = literal.make_loop(TINY)
    besides = Published(TINY)
    for (text, mask), real in (
        (besides.encode(*besides.prompt()), TINY.prompt_tokens),
        (besides.encode(*besides.empty()), EMPTY_TOKENS),
    ):
        assert text.shape == (1, MAX_TOKENS, 32) and mask.shape == (1, MAX_TOKENS)
        assert int(mask.sum()) == real
    written = []
    write_image = besides.write_image
    besides.write_image = lambda latents: written.append(write_image(latents))
    student = loop.parameters_of("student").values()
    before = [p.detach().clone() for p in student]
    published = literal.PublishedLoop(loop, besides)
    noise = torch.randn(1, *TINY.sample_shape)
    assert published.aux_update(noise) > 0
    published.student_update(noise, (80, 40))
    assert len(written) == 1 and written[0] > 0
    assert any(not torch.equal(p, old) for p, old in zip(student, before, strict=True))
