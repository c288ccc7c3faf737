"""How many multiprocessors a launch has to fill."""

import pytest
import torch

from mfd_fast.kernels import card, glu_depthwise


def test_an_h100_is_assumed_where_no_device_can_be_asked():
    assert card.multiprocessors(torch.device("meta")) == 132


def test_the_variable_takes_the_place_of_the_device(monkeypatch):
    monkeypatch.setenv("MFD_FAST_MULTIPROCESSORS", "8")
    monkeypatch.setattr(card, "FORCED", card._forced())
    assert card.multiprocessors(torch.device("meta")) == 8
    x = torch.empty(1, 1024, 11200, device="meta", dtype=torch.bfloat16)
    _, rows, _ = glu_depthwise._grid(x, 32, 32, backward=False)
    assert rows == 32  # a small card is full of whole walks
    monkeypatch.setattr(card, "FORCED", None)
    assert glu_depthwise._grid(x, 32, 32, backward=False)[1] < 32


@pytest.mark.parametrize("text", ["", "0", "-3", "many"])
def test_another_word_is_refused(text, monkeypatch):
    monkeypatch.setenv("MFD_FAST_MULTIPROCESSORS", text)
    with pytest.raises(ValueError, match="MFD_FAST_MULTIPROCESSORS must be a whole number above 0"):
        card._forced()
