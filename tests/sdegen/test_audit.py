"""An exact model does not drift, a wrong one does, and the asymmetry of a known Jacobian is what it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sdegen.bins import Bins
from sdegen.cli import main
from sdegen.decoders import CategoricalHead
from sdegen.likelihood import asymmetry, audit
from sdegen.likelihood.audit import _ratio
from sdegen.models import VAE, VPSDE, GaussianDiffusion
from sdegen.oracles import oracle
from sdegen.paths import VP, GaussianPath, LinearLogSNR
from sdegen.results import read, write
from solvers import Prediction


class _Linear:
    """eps = A z: the Jacobian is A at every level."""

    event_shape = (3,)

    def __init__(self, a: Tensor) -> None:
        self.a = a

    def predict(self, path: GaussianPath) -> Callable[[Tensor, Tensor], Prediction]:
        def predict(z: Tensor, t: Tensor) -> Prediction:
            eps = z @ self.a.T
            return Prediction((z - path.sigma(t) * eps) / path.alpha(t), eps)

        return predict


def _truth(low: float = 8.0, high: float = -8.0) -> tuple[GaussianDiffusion, Tensor]:
    truth = oracle("mixture2d")
    return VPSDE(truth, VP(LinearLogSNR(low, high))), truth.sample(48, seed=0)


def test_the_asymmetry_of_a_known_jacobian() -> None:
    a = torch.tensor([[1.0, 0.5, 0.0], [-0.2, 2.0, 0.3], [0.1, 0.0, 0.7]], dtype=torch.float64)
    x = torch.zeros(4000, 3, dtype=torch.float64)
    model = VPSDE(_Linear(a), VP(LinearLogSNR(4, -4)))  # type: ignore[arg-type]
    found = asymmetry(model, x, levels=3)
    assert found.logsnr.tolist() == pytest.approx([2, 0, -2], abs=1e-9)
    exact = float((a - a.T).norm() / a.norm())
    assert ((found.score - exact).abs() < 4 * found.score_se).all()
    sigma = torch.sigmoid(-found.logsnr).sqrt()
    for i in range(3):
        b = torch.eye(3) - sigma[i] * a
        ratio = float(sigma[i] * (a - a.T).norm() / b.norm())
        assert abs(float(found.x0[i]) - ratio) < 4 * float(found.x0_se[i])


def test_an_exact_score_is_a_gradient() -> None:
    model, x = _truth()
    found = asymmetry(model, x)
    assert float(found.score.max()) < 1e-9
    assert float(found.x0.max()) < 1e-8


def test_an_exact_model_does_not_drift(tmp_path: Path) -> None:
    model, x = _truth()
    said: list[tuple[str, float]] = []
    found = audit(model, x, T=(20,), tol=1e-5, draws=8, progress=lambda what, share: said.append((what, share)))
    moves = {(m.title, m.knob, m.after): m for m in found.moves}
    assert {knob for _, knob, _ in moves} == {"clean end", "noisy end", "T", "tolerance", "probes", "seed"}
    for (title, knob, _), move in moves.items():
        if knob in ("tolerance", "noisy end") and title == "ODE":
            assert abs(move.drift) < 2e-3
        elif knob in ("probes", "seed", "noisy end"):
            assert abs(move.drift) < 4.5 * move.drift_se + 2e-3, (title, knob)
    assert moves["T = 20", "T", "40"].drift < -10 * moves["T = 20", "T", "40"].drift_se
    assert found.gap is not None
    assert abs(found.gap[0]) < 4.5 * found.gap[1] + 5e-3
    text = str(found)
    assert "ODE minus bound" in text
    assert "nats" in text
    assert next(line for line in text.splitlines() if line.startswith("T = 20")).endswith("<<")
    assert said[-1][0] == "asymmetry"
    assert all(a <= b for (_, a), (_, b) in pairwise(said))
    write(tmp_path / "x.h5", "audit", found.to_result(seed=0))
    back = read(tmp_path / "x.h5", "audit")
    assert back["drift"].tolist() == [m.drift for m in found.moves]
    assert back.attributes["gap"] == found.gap[0]
    assert back["asymmetry_score"].shape == (9,)


def test_ends_that_cut_something_off_show() -> None:
    """A path that ends while much is unknown: the noisy end moved outward makes the bound fall."""
    model, x = _truth(8, 1)
    found = audit(model, x, T=(), ode_examples=2, tol=1e-2)
    outward = next(m for m in found.moves if (m.title, m.knob, m.after) == ("all levels", "noisy end", "0"))
    assert outward.drift < -3 * outward.drift_se


def test_a_vae(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = VAE.mlp((1, 3, 3), CategoricalHead(Bins(5)), latent=2, width=8)
    for p in vae.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x = Bins(5).value(torch.randint(5, (40, 1, 3, 3), generator=torch.Generator().manual_seed(0)))
    found = audit(vae, x, K=8)
    assert (found.gap, found.asymmetry) == (None, None)
    moves = {(m.title, m.knob): m for m in found.moves}
    assert moves["IWAE", "K"].drift < 3 * moves["IWAE", "K"].drift_se
    assert abs(moves["bound", "seed"].drift) < 4 * moves["bound", "seed"].drift_se
    assert "bits/dim" in str(found)
    assert "asymmetry_score" not in found.to_result().arrays


def test_what_cannot_be_audited() -> None:
    model, x = _truth()
    with pytest.raises(ValueError, match="ode_examples and probe_examples are at least 1"):
        audit(model, x, ode_examples=0)
    x[3, 0] = math.inf
    with pytest.raises(ValueError, match="example 3 is not finite"):
        audit(model, x)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(tmp_path / "run")
    tiny = ["--network=mlp", "--network.width=16", "--network.depth=1", "--train.steps=5", "--train.eval_every=0"]
    assert main(["train", run, *tiny, "--threads=1"]) == 0
    assert main(["audit", run, "--n=6", "--ode_n=2", "--tol=0.1", "--T=5", "--draws=2"]) == 0
    assert "each knob one notch, on 6 examples" in capsys.readouterr().out
    assert read(tmp_path / "run" / "results.h5", "audit").attributes["ode_n"] == 2
    assert main(["audit", run, "--T=0"]) == 2
    assert "T: expected a list" in capsys.readouterr().err


def test_the_standard_error_of_a_ratio_is_calibrated() -> None:
    noise = torch.randn(2, 500, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    below = noise[0].square()
    found = torch.tensor([[*map(float, _ratio(*pair))] for pair in zip(below * noise[1].exp(), below, strict=True)])
    assert float(found[:, 1].mean() / found[:, 0].std()) == pytest.approx(1.0, abs=0.2)
