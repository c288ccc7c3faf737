"""The attention that a network runs: named, and refused where the student could not learn."""

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry
from tiny_pipelines import tiny_pipeline

from mfd_fast.diffusers import distillation
from mfd_fast.models.diffusers.attention import use_attention


@pytest.fixture(autouse=True)
def _unchanged(monkeypatch):
    """Naming a backend changes what every network of the process runs."""
    monkeypatch.setattr(registry, "_active_backend", registry._active_backend)


@pytest.mark.parametrize("name", ["sd3", "flux1-dev"])  # an older processor, and the dispatcher
def test_what_runs_is_named(name):
    assert use_attention(tiny_pipeline(name).transformer).startswith("native, torch's ")


def test_another_backend_is_set_and_runs():
    transformer = tiny_pipeline("flux1-dev").transformer
    assert use_attention(transformer, "_native_math") == "_native_math"
    assert use_attention(transformer) == "_native_math"


def without_backward(query, key, value, **_):
    return torch.nn.functional.scaled_dot_product_attention(query, key, value).detach()


def test_a_backend_without_a_backward_is_refused_by_name(monkeypatch):
    transformer = tiny_pipeline("flux1-dev").transformer
    refused = r"attention 'flex' cannot train the student on cpu in torch.float32: FlexAttention"
    with pytest.raises(ValueError, match=refused):
        use_attention(transformer, "flex")
    monkeypatch.setitem(registry._backends, AttentionBackendName.SAGE, without_backward)
    registry.set_active_backend(AttentionBackendName.SAGE)
    transformer.reset_attention_backend()
    with pytest.raises(ValueError, match=r"attention 'sage' .*: it has no backward; take native"):
        use_attention(transformer)


def test_what_is_not_there_is_refused_by_name():
    pipe = tiny_pipeline("flux1-dev")
    with pytest.raises(ValueError, match=r"pipeline.attention must be one of .*got 'fast'"):
        use_attention(pipe.transformer, "fast")
    with pytest.raises(ValueError, match=r"attention 'xformers' .* install"):
        use_attention(pipe.transformer, "xformers")


def test_the_library_form_checks_it(monkeypatch):
    pipe = tiny_pipeline("flux1-dev")
    assert distillation(pipe, rank=2, height=64, width=64).attention.startswith("native")
    monkeypatch.setitem(registry._backends, AttentionBackendName.NATIVE, without_backward)
    with pytest.raises(ValueError, match=r"attention 'native' .*: it has no backward"):
        distillation(tiny_pipeline("flux1-dev"), rank=2, height=64, width=64)
