"""A data set in shards: together they give what the whole gives, and what is said of the whole is judged there."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from truths import PATHS, OfAClass, grey, grey_model

from sdegen.likelihood import LikelihoodReport, bound, ode_likelihood
from sdegen.likelihood.evaluate import _whole, evaluate
from sdegen.likelihood.report import gap, merged
from sdegen.models import VPSDE, GaussianDiffusion
from sdegen.oracles import oracle
from sdegen.paths import VP, LinearLogSNR


def _model() -> GaussianDiffusion:
    return grey_model(std=0.3)


# --- shards and the whole ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["bound(draws=8)", "bound(T=4)", "ode(solver=heun, steps=3)"])
def test_shards_give_what_the_whole_gives(method: str) -> None:
    shards, whole = (evaluate(_model(), grey(25), methods=[method], shard=shard)[method] for shard in (6, 64))
    torch.testing.assert_close(shards.values, whole.values, rtol=1e-4, atol=1e-4)
    assert shards.estimator_se == pytest.approx(whole.estimator_se, rel=1e-3)
    if method.startswith("bound(d"):
        plain = bound(_model(), grey(25), draws=8)
        torch.testing.assert_close(whole.values, plain.values, rtol=1e-5, atol=1e-5)
        assert whole.forward == pytest.approx(plain.forward)


def test_parts_become_a_whole() -> None:
    model, x = _model(), grey(25)
    whole, parts = bound(model, x, draws=4), [bound(model, part, draws=4) for part in x.split(10)]
    one = merged(parts)
    assert len(one.values) == 25
    assert one.forward == whole.forward
    assert sum(one.parts.values()) == pytest.approx(one.nats)
    noise = sum((p.estimator_se * len(p.values)) ** 2 for p in parts)
    assert one.estimator_se == pytest.approx(math.sqrt(noise) / 25)
    spread = float(one.values.var()) - noise / 25
    assert one.data_se == pytest.approx(math.sqrt(spread / 25)) if spread > 0 else math.isnan(one.data_se)
    mean, error = gap(parts[0], whole)
    apart = parts[0].values - whole.values[:10]
    assert (mean, error) == (float(apart.mean()), float(apart.std()) / math.sqrt(10))


def _of_classes() -> tuple[GaussianDiffusion, Tensor, Tensor]:
    """A model of two classes, and data all of which are of their class."""
    labels = torch.arange(24) // 3 % 2
    x = labels[:, None] + 0.5 * torch.randn(24, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return VPSDE(OfAClass(), VP(LinearLogSNR(9, -9))), x, labels  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["bound(draws=16)", "bound(T=50)", "ode(tol=1e-3)"])
def test_every_shard_has_the_labels_of_its_examples(method: str) -> None:
    model, x, labels = _of_classes()
    own, whole = (evaluate(model, x, labels, methods=[method], shard=shard)[method] for shard in (5, 64))
    other = evaluate(model, x, 1 - labels, methods=[method], shard=5)[method]
    torch.testing.assert_close(own.values, whole.values, rtol=1e-6, atol=1e-6)
    assert other.nats > own.nats + 0.5


def test_labels_are_a_part_of_the_question(tmp_path: Path) -> None:
    model, x, labels = _of_classes()
    given = {"methods": ["bound(draws=2)"], "folder": tmp_path}
    for cond, known in ((labels, False), (1 - labels, False), (None, False), (labels.clone(), True)):
        assert bool(evaluate(model, x, cond, **given).known) == known  # type: ignore[arg-type]


# --- what is said of the whole ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["bound", "ode(solver=heun, steps=4)"])
def test_sampling_goes_on_until_the_target_or_the_budget(method: str) -> None:
    model, x = _model(), grey(25)
    before = evaluate(model, x, methods=[method], shard=3)[method]
    target = before.in_bits(before.estimator_se) / 3
    found = evaluate(model, x, methods=[method], target_se=target, shard=3)[method]
    assert 0.5 * target < found.in_bits(found.estimator_se) <= target * 1.001  # all shards together, and no more
    assert found.forward > before.forward
    assert "target" not in found.note
    short = evaluate(model, x, methods=[method], target_se=target / 100, max_nfe=64, shard=3)
    assert short[method].note.startswith("the target was not reached within max_nfe=64: ")
    assert short[method].note.count("target") == 1  # of the whole, and not of every shard again
    assert short[method].forward <= 64
    assert short[method].note in str(short)


def _parts() -> tuple[LikelihoodReport, LikelihoodReport]:
    """Two reports by the ODE that nothing is wrong with, of 4 and of 12 examples."""
    truth = oracle("mixture2d")
    model, x = VPSDE(truth, PATHS["flow"]), truth.sample(16, seed=0)
    one, other = (
        ode_likelihood(model, x[rows.start : rows.stop], samples=rows, tol=1e-4) for rows in (range(4), range(4, 16))
    )
    assert (one.kind, other.kind, one.note) == ("exact", "exact", "")
    return one, other


def test_the_solver_s_error_of_the_whole_is_a_root_mean_square() -> None:
    one, other = (replace(part, solver_error=e) for part, e in zip(_parts(), (0.2, 0.4), strict=True))
    assert merged([one, other]).solver_error == pytest.approx(math.sqrt((4 * 0.04 + 12 * 0.16) / 16))
    assert merged([one, replace(other, solver_error=None)]).solver_error is None


def test_a_solver_s_error_that_no_shard_minds_may_be_too_large_for_the_whole() -> None:
    """Noise of the shards averages out, and errors of the solver do not."""
    noisy = [replace(part, estimator_se=0.5, solver_error=0.4) for part in _parts()]  # each below its own noise
    whole = _whole(None, None, noisy)
    assert whole.estimator_se == pytest.approx(0.5 * math.hypot(4, 12) / 16)
    assert whole.kind == "estimate"
    assert whole.note == "the solver's error, 0.4 nats, is larger than 0.395: ask for a smaller tol or more steps"
    assert _whole(0.41, None, noisy).kind == "exact"  # a target says what is minded
    small = [replace(part, solver_error=0.39) for part in noisy]
    assert (_whole(None, None, small).kind, _whole(None, None, small).note) == ("exact", "")
    bounds = [replace(part, kind="upper bound") for part in noisy]
    assert _whole(None, None, bounds).kind == "estimate"
    said = "the solver's error, 0.4 nats, is larger than 0.2"
    guesses = [replace(part, kind="estimate", note=said) for part in noisy]
    assert _whole(None, None, guesses).note == whole.note  # the numbers of the whole, in the unit of the whole
    bits = [replace(part, bits_offset=0.0) for part in guesses]
    assert "error, 0.289 bits/dim, is larger than 0.285:" in _whole(None, None, bits).note


def test_a_whole_is_no_more_exact_than_its_parts() -> None:
    one, other = _parts()
    assert merged([one, other]).kind == "exact"
    assert merged([one, replace(other, kind="estimate")]).kind == "estimate"
