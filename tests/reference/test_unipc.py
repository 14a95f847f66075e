"""The authors' code of UniPC, ``vary_coeff``: a step as it computes it, in numbers of our own, against the method.

Reference: Zhao et al. 2023, arXiv:2302.04867; https://github.com/wl-zhao/UniPC (``uni_pc.py`` at 25acd34).
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from sdegen.certificates import problems
from solvers import DiffusionProblem, Path, UniPC, integrate
from solvers.certify import exact, starts
from solvers.grids import logsnr
from solvers.problem import mix


def h_phi(h: float, k: int) -> float:
    """-h phi_k(-h), from h phi_1 = e^h - 1 and phi_(k+1)(h) = (phi_k(h) - 1 / k!) / h."""
    value = math.expm1(-h)
    for j in range(1, k):
        value = value / -h - 1 / math.factorial(j)
    return value


def weights(r: list[float], h: float, corrector: bool, leftover: bool) -> np.ndarray:
    """What multiplies the differences (P_j - P_t) / r_j in a step of length h in lam, in units of -alpha_s.

    The coefficients of the derivatives, A = C^-1 with C_jk = r_j^(k-1) / k!, meet h phi_2, h phi_3, ...: all of them
    for the nodes behind, in the loop over k. The new node, r = 1, is added after the loop with the last h phi and
    with the row of A where the loop's index stopped, the last but one (``leftover``); it has a share in every row.
    """
    nodes = np.array([*r, 1.0] if corrector else r)
    n = len(nodes)
    if n == 0:
        return np.zeros(0)
    a = np.linalg.inv(np.stack([nodes ** (k - 1) / math.factorial(k) for k in range(1, n + 1)], 1))
    phis = np.array([h_phi(h, k + 1) for k in range(1, n + 1)])
    if not (corrector and leftover):
        return phis @ a
    behind = phis[:-1] @ a[:-1, :-1]
    return np.append(behind, phis[-1] * a[max(n - 2, 0), -1])


def sampled(problem: DiffusionProblem, x: Tensor, ts: Tensor, p: int, leftover: bool) -> Tensor:
    """Their loop, of data predictions: orders 1, ..., p; what was predicted before the corrector is remembered."""
    path: Path = problem.path
    lam = (path.logsnr(ts) / 2).tolist()
    seen = [problem.predict(x, ts[0]).x0]
    for i in range(1, len(ts)):
        h, order = lam[i] - lam[i - 1], min(i, p)
        r = [(lam[i - 1 - j] - lam[i - 1]) / h for j in range(1, order)]
        differences = [mix((1 / r[j - 1], seen[-1 - j]), (-1 / r[j - 1], seen[-1])) for j in range(1, order)]
        alpha, plain = path.alpha(ts[i]), -path.alpha(ts[i]) * math.expm1(-h)
        start = mix((path.sigma(ts[i]) / path.sigma(ts[i - 1]), x), (plain, seen[-1]))

        def moved(differences: list[Tensor], corrector: bool, start=start, alpha=alpha, r=r, h=h) -> Tensor:
            c = weights(r, h, corrector, leftover)
            return mix((1.0, start), *((-alpha * float(w), d) for w, d in zip(c, differences, strict=True)))

        x = moved(differences, corrector=False)
        if i < len(ts) - 1:
            seen.append(problem.predict(x, ts[i]).x0)
            x = moved([*differences, seen[-1] - seen[-2]], corrector=True)
    return x


@pytest.fixture(scope="module")
def problem() -> DiffusionProblem:
    return problems()["vp"]


@pytest.mark.parametrize("p", [1, 2, 3])
def test_with_all_rows_it_is_ours(p: int, problem: DiffusionProblem) -> None:
    """So that the arithmetic above is theirs but for the index; ours takes the exact moments there too."""
    x, ts = starts(problem), logsnr(problem.path, 12)
    assert torch.allclose(
        sampled(problem, x, ts, p, leftover=False), integrate(UniPC(p, variant="vary"), problem, x, ts).x, atol=1e-11
    )


def test_the_index_that_is_left_over_costs_all_orders_but_one(problem: DiffusionProblem) -> None:
    """1 in place of 3 at p = 2, as published; at p = 1 there is one row, and no loop that could leave an index."""
    x, answer = starts(problem), exact(problem, starts(problem))

    def slope(p: int, leftover: bool) -> float:
        errors = [
            float((sampled(problem, x, logsnr(problem.path, n), p, leftover) - answer).square().mean().sqrt())
            for n in (80, 160)
        ]
        return math.log2(errors[0] / errors[1])

    assert slope(1, leftover=True) == pytest.approx(2, abs=0.2)
    assert slope(2, leftover=False) == pytest.approx(3, abs=0.2)
    assert [slope(p, leftover=True) for p in (2, 3)] == pytest.approx([1, 1], abs=0.1)
