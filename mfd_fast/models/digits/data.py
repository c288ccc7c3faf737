"""The 1,797 handwritten digits of 8x8 pixels that ship with scikit-learn.

Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
Repository (1998), its test part.  Nothing is downloaded.
"""

import torch
from torch import Tensor

MAX_VALUE = 16.0  # a pixel counts the dark points of a 4x4 square


def load_digits() -> tuple[Tensor, Tensor]:
    """Images ``[1797, 1, 8, 8]`` float32 in [-1, 1] (1 = ink), labels ``[1797]`` int64 0 to 9.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(
            "the digits need scikit-learn, which is not installed; "
            "run: pip install 'mfd-fast[digits]'"
        ) from error
    bunch = datasets.load_digits()
    images = torch.from_numpy(bunch.images).float() * (2.0 / MAX_VALUE) - 1.0
    return images.unsqueeze(1), torch.from_numpy(bunch.target).long()
