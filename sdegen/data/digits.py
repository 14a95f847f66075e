"""Handwritten digits of 8x8 pixels that ship with scikit-learn: real images, nothing to download."""

from __future__ import annotations

from typing import Any

import torch

from sdegen.bins import Bins
from sdegen.data.dataset import Dataset

__all__ = ["digits"]


def digits(seed: int = 0, test_size: int = 360) -> Dataset:
    """1797 digits, 8x8 pixels of 17 grey levels, ten classes; 1437 to train on and 360 held out, the same share of
    each.

    Three of the 64 pixels are constant; nothing here divides by a pixel's spread.

    Args:
        seed: of the stratified split.
        test_size: number of held-out images.

    Reference: Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository.

    >>> print(digits().describe())
    digits: 1437 training and 360 held-out examples of 1x8x8, 17 grey levels, 10 classes
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch: Any = load_digits()
    images, labels = torch.from_numpy(bunch.images).long().unsqueeze(1), torch.from_numpy(bunch.target).long()
    bins = Bins(17)
    train, test = train_test_split(range(len(images)), test_size=test_size, stratify=labels, random_state=seed)
    return Dataset(
        name="digits",
        train=bins.value(images[train]),
        test=bins.value(images[test]),
        bins=bins,
        train_cond=labels[train],
        test_cond=labels[test],
        scale=bins.width,
        shift=1 / bins.count - 1,
        source=f"sklearn.datasets.load_digits, stratified split with random_state={seed}",
    )
