"""Reports of a likelihood: that they hold what they must, whoever made them; and bad input, one line each."""

from __future__ import annotations

import math

import pytest
import torch
from truths import grey, grey_model

from sdegen.bins import Bins
from sdegen.decoders import CategoricalHead
from sdegen.likelihood import Exact, Hutchinson, bound, importance, ode_likelihood
from sdegen.models import VAE, VPSDE, uniform
from sdegen.oracles import oracle
from sdegen.paths import VP, LinearLogSNR

# What a number must come with before anybody can believe it.
FIELDS = {
    "nats", "bits_per_dim", "kind", "of", "parts", "estimator_se", "data_se", "solver_error", "forward", "vjp", "jvp",
    "seconds", "dequantizer", "bin_width", "logsnr", "tolerance", "solver", "seed", "settings",
}  # fmt: skip


def test_a_report_holds_all_that_is_needed_to_believe_it() -> None:
    model, x = grey_model(), grey(24)
    vae = VAE.mlp((1, 3, 3), CategoricalHead(Bins(5)), latent=2, width=8)
    reports = [
        bound(model, x, draws=3),
        bound(model.discretize(5), x, draws=3),
        bound(vae, x, draws=3),
        bound(uniform((1, 3, 3), Bins(5)), x),
        importance(vae, x, 5),
        ode_likelihood(model, x, solver="heun", steps=3, draws=2),
    ]
    for report in reports:
        facts = report.to_dict()
        assert report.values.shape == (24,)
        assert report.values.dtype == torch.float64
        assert math.isfinite(report.nats + report.estimator_se + report.bits_per_dim)
        assert report.data_se > 0 or math.isnan(report.data_se)
        assert facts["kind"] in ("exact", "upper bound", "estimate")
        assert facts["of"] == "probability"
        assert facts["seconds"] > 0
        assert report.in_bits(report.nats) == pytest.approx(report.bits_per_dim)
        assert "bits/dim" in str(report)
        assert facts.keys() >= FIELDS
    for report in (*reports[:3], reports[5]):
        assert report.logsnr is None or report.logsnr[0] > report.logsnr[1]
        assert sum(report.parts.values()) == pytest.approx(report.nats, rel=1e-6)
    assert [r.kind for r in reports] == ["upper bound"] * 3 + ["exact", "upper bound", "estimate"]
    assert reports[3].estimator_se == 0
    assert [r.dequantizer is None for r in reports] == [False] * 3 + [
        True,
        False,
        False,
    ]  # a baseline has levels itself
    assert reports[0].forward == 2 * 3
    assert reports[5].forward == 2 * 6 + (8 / 24) * (6 + 12)  # and eight of the data again, with finer steps, too
    assert reports[5].vjp == 9 * reports[5].forward


def test_parts_of_the_ode_add_up() -> None:
    for report in (
        ode_likelihood(grey_model(), grey(10), solver="heun", steps=3, draws=2),
        ode_likelihood(VPSDE(oracle("mixture2d")), oracle("mixture2d").sample(10, seed=0), solver="heun", steps=9),
    ):
        assert sum(report.parts.values()) == pytest.approx(report.nats, rel=1e-9)


def test_reports_do_not_depend_on_how_the_data_are_cut() -> None:
    model, x = grey_model(), grey(20)
    ode = [ode_likelihood(model, x, solver="heun", steps=4, draws=2, batch=b).values for b in (6, 64)]
    torch.testing.assert_close(ode[0], ode[1], rtol=1e-5, atol=1e-5)
    seen: list[tuple[int, int]] = []
    bound(model, x, draws=2, batch=8, progress=lambda done, of: seen.append((done, of)))
    assert seen == [(4, 20), (8, 20), (12, 20), (16, 20), (20, 20)]


def test_scoring_leaves_the_model_as_it_was() -> None:
    model, x = grey_model().train(), grey(4)
    bound(model, x, draws=1)
    assert model.training
    again = [bound(model, x, draws=2, seed=3).nats for _ in range(2)]
    assert again[0] == again[1]


def test_errors_of_estimator_and_data_are_told_apart() -> None:
    truth = oracle("mixture2d")
    model = VPSDE(truth, VP(LinearLogSNR(8, -8)))
    x = truth.sample(400, seed=0)
    few, many = bound(model, x, draws=2), bound(model, x, draws=32)
    assert many.estimator_se < few.estimator_se / 3
    spread = float(truth.log_prob(x).std()) / math.sqrt(400)
    assert many.data_se == pytest.approx(spread, rel=0.35)
    assert math.isnan(bound(model, x[:5], repeats=1).estimator_se)


def test_a_density_without_bin_width_has_no_bits() -> None:
    truth = oracle("mixture2d")
    model, x = VPSDE(truth), truth.sample(4, seed=0)
    assert math.isnan(bound(model, x, draws=2).bits_per_dim)
    known = bound(model, x, draws=2, bin_width=0.1)
    assert known.bits_per_dim == pytest.approx(known.in_bits(known.nats) - math.log2(0.1))
    assert ode_likelihood(model, x, solver="heun", steps=5).kind == "estimate"
    assert ode_likelihood(model, x, solver="heun", steps=5, trace=Hutchinson(2)).kind == "estimate"


def test_bad_input_is_refused_in_one_line() -> None:
    model, x = grey_model(), grey(4)
    for call, words in (
        (
            lambda: ode_likelihood(model, x, trace=Exact(limit=8)),
            r"9 coordinates costs 9 .* Hutchinson\(probes=...\), or Exact\(limit=9\)",
        ),
        (lambda: Hutchinson(0), "at least one probe"),
        (lambda: bound(model, x[:0]), "no data"),
        (lambda: bound(model, x, draws=0), "at least 1"),
        (lambda: bound(model, x.squeeze(1)), "has shape"),
        (lambda: bound(model, x, bin_width=0.1), "probabilities"),
        (lambda: ode_likelihood(model, x, solver="dopri"), "dopri5"),
        (lambda: ode_likelihood(model, x, solver="heun", steps=0), "at least 1"),
        (lambda: ode_likelihood(model, x, solver="heun", steps=2, draws=0), "at least 1"),
        (lambda: ode_likelihood(model, x, solver="euler_maruyama", steps=2), "noise"),
        (lambda: ode_likelihood(model, x, solver="heun", steps=3, tol=1e-3), "at most one"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
