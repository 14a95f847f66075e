"""Distorted copies: slight, on grey levels, labelled, and never what is scored."""

from __future__ import annotations

import pytest
import torch

from sdegen.bins import Bins
from sdegen.building import build
from sdegen.config import configure
from sdegen.data import digits
from sdegen.parsing import UsageError
from sdegen.train import TrainConfig, augment, fit

TINY = ("--network", "mlp", "--network.width=16", "--network.depth=1", "--train.eval_every=0", "--train.eval_size=8")


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_share_of_the_batch_is_distorted_and_says_so() -> None:
    x, digit = digits().train[:100], digits().train_cond
    assert digit is not None
    found, labels = augment.augmented(x, digit[:100], 0.3, 10, Bins(17), _generator())
    assert labels.tolist() == [10] * 30 + digit[30:100].tolist()
    assert torch.equal(found[30:], x[30:])
    Bins(17).index(found)  # every value is a grey level
    moved = (found[:30] - x[:30]).flatten(1).abs().amax(1)
    assert (moved > 0).all()
    alike = torch.stack([torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1] for a, b in zip(found, x)])  # noqa: B905
    assert float(alike[:30].mean()) > 0.6
    _, unlabelled = augment.augmented(x, None, 0.5, 0, Bins(17), _generator())
    assert unlabelled.tolist() == [0] * 50 + [-1] * 50
    again, _ = augment.augmented(x, None, 0.3, 0, Bins(17), _generator())
    assert torch.equal(found, again)


def test_no_distortion_is_the_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in ("TURN", "STRETCH", "SHEAR", "SHIFT"):
        monkeypatch.setattr(augment, limit, 0.0)
    x = torch.rand(5, 2, 6, 7, generator=_generator())
    torch.testing.assert_close(augment.distorted(x, _generator()), x)


def test_the_directions_are_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shift moves an image by at most so many pixels."""
    for limit in ("TURN", "STRETCH", "SHEAR"):
        monkeypatch.setattr(augment, limit, 0.0)
    ramp = torch.arange(9.0).expand(64, 1, 5, 9)
    moved = augment.distorted(ramp, _generator())[:, 0, 2, 4] - 4
    assert float(moved.abs().max()) <= augment.SHIFT
    assert float(moved.abs().max()) > 0.8 * augment.SHIFT


def test_without_a_label_the_model_speaks_of_the_data() -> None:
    config, _ = configure((*TINY, "--train.augment=0.5", "--train.steps=4", "--train.batch_size=8"))
    data, model = build(config)
    done = fit(model, data, config.train, progress=False)
    assert done.steps == 4
    distorted_ones = torch.zeros(8, dtype=torch.long)
    u = torch.linspace(0.1, 0.9, 8, dtype=torch.float64)
    with torch.no_grad():
        for p in model.parameters():  # a network that has learnt something
            p.add_(0.1 * torch.randn(p.shape, generator=_generator()))
        bounds = [
            model.bound(data.test[:8], cond, u, _generator()).total
            for cond in (None, distorted_ones - 1, distorted_ones)
        ]
    assert torch.equal(bounds[0], bounds[1])
    assert not torch.equal(bounds[0], bounds[2])


def test_labels_of_the_data_stay() -> None:
    config, _ = configure((*TINY, "--train.augment=0.5", "--train.conditional=true", "--train.steps=2"))
    _, model = build(config)
    assert model.denoiser.net.condition.classes == 11


def test_only_images_are_distorted() -> None:
    with pytest.raises(UsageError, match=r"train.augment distorts images, and an example of moons has shape \(2,\)"):
        build(configure(("--data", "moons", "--train.augment=0.2"))[0])
    with pytest.raises(ValueError, match=r"not data of shape \(3, 2\)"):
        augment.augmented(torch.zeros(3, 2), None, 0.5, 0, None, _generator())
    with pytest.raises(ValueError, match="augment must lie in"):
        TrainConfig(steps=1, augment=1.0)
