# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 4 · Write your own solver
#
# An idea for a solver is a page of formulas. Here it becomes thirty lines, and a minute later there is a
# **certificate** that says, line by line, whether they do what the formulas promise. Then we break the solver on
# purpose, in seven ways that look fine in pictures, and see what the certificate says.

# %% tags=["hide-input", "setup"]
import inspect
import os
import re
import textwrap
from dataclasses import dataclass
from typing import NamedTuple

import torch
from matplotlib.figure import Figure

import sdegen
from sdegen import plots, style
from sdegen.paths import LinearLogSNR
from sdegen.plots import Dot, Panel, Series
from sdegen.solver_plots import heat_map
from sdegen.style import COLORS, INK, looks
from solvers import GRIDS, SOLVERS, Solver, mix, prior, solve, trace
from solvers.certify import certify, exact, mixture, starts

style.notebook()
torch.set_num_threads(1)
f64 = {"dtype": torch.float64}
FAST = bool(os.environ.get("SDEGEN_FAST"))  # the same in small

# %% [markdown]
# ## 1 · What a solver is
#
# One method, `step`: given the state `x` at time `t`, say the state at time `s`. It may ask `problem.predict(x, t)` for
# the guess of datum and noise, and `problem.path` for $\alpha$, $\sigma$ and logsnr. Steps from noise to data have
# $s<t$, and steps from data to noise $s>t$; the same code does both. Counting calls, walking the grid, saving
# trajectories and finding the step at which something became infinite are somebody else's job.
#
# The smallest one that is any good is DDIM, $z_s = \alpha_s \hat x_0+\sigma_s\hat\epsilon$:


# %%
@dataclass(frozen=True)
class MyDDIM(Solver[None]):
    order = 1
    nfe_per_step = 1
    invariant = True  # how the path scales its states makes no difference

    def step(self, problem, x, t, s, state, noise):
        x0, eps = problem.predict(x, t)
        return mix((problem.path.alpha(s), x0), (problem.path.sigma(s), eps)), state


# %% [markdown]
# (`mix` is a linear combination. A solver is a frozen dataclass: its fields are settings, and nothing in it changes.)
#
# ## 2 · An idea
#
# With $\lambda=\tfrac12\mathrm{logsnr}$, the probability-flow ODE has the solution
#
# $$ z_s \;=\; \frac{\sigma_s}{\sigma_t} z_t + \sigma_s\int_{\lambda_t}^{\lambda_s} e^\lambda\,\hat x_0\,d\lambda ,$$
#
# and DDIM holds $\hat x_0$ fixed for a step. **Let it move on a straight line instead**, through the last two guesses:
# $\hat x_0(\lambda) \approx \hat x_0 + (\lambda-\lambda_t)\,D$ with
# $D = (\hat x_0 - \hat x_0^{\text{last}})/(\lambda_t-\lambda^{\text{last}})$. The integral is elementary; with
# $h=\lambda_s-\lambda_t$,
#
# $$ z_s \;=\; \frac{\sigma_s}{\sigma_t} z_t \;+\; \alpha_s\left[(1-e^{-h})\,\hat x_0 + (h-1+e^{-h})\,D\right]. $$
#
# It should be of order 2, and costs no more calls than DDIM. In thirty lines:


# %%
class Last(NamedTuple):
    """What the method remembers of the step before."""

    lam: torch.Tensor
    x0: torch.Tensor


@dataclass(frozen=True)
class StraightLine(Solver[Last | None]):
    """The guess of the datum moves on the line through the last two guesses."""

    order = 2
    nfe_per_step = 1
    invariant = True

    def step(self, problem, x, t, s, state, noise):
        path = problem.path
        lam, target = path.logsnr(t) / 2, path.logsnr(s) / 2
        h = target - lam
        x0 = problem.predict(x, t).x0
        slope = 0 * x0 if state is None else (x0 - state.x0) / (lam - state.lam)
        moved = mix((-torch.expm1(-h), x0), (h + torch.expm1(-h), slope))
        return mix((path.sigma(s) / path.sigma(t), x), (path.alpha(s), moved)), Last(lam, x0)


# %% [markdown]
# (The memory is handed in and out, and is `None` before the first step, so nothing is kept between two solves.)
#
# ## 3 · Its certificate
#
# On data whose solution is known to thirteen digits: walk ever finer grids, even and uneven ones, on three paths, and
# see how fast the error falls; take a few short steps with an exact history; and check what every solver owes its
# caller.

# %%
vp = sdegen.VP(LinearLogSNR(8, -8))
problems = {curve: mixture(vp.on(curve)) for curve in ("vp", "ve", "flow")}
answers = {curve: exact(problem, starts(problem)) for curve, problem in problems.items()}

certificate = certify(StraightLine(), problems, answers=answers)
print(certificate)
assert certificate.passed

# %% [markdown]
# It holds. And since a linear step is a table of numbers, the solver can be looked at: which guess has a say in which
# step?

# %%
heat_map(trace(StraightLine(), vp, GRIDS["logsnr"](vp, 12)))

# %% [markdown]
# By the way: this idea has a name. It is DPM-Solver++(2M) in its exact form, to the last digit.

# %%
problem = problems["vp"]
noise = prior(vp, (64, 2), seed=0, **f64)
answer = exact(problem, noise)
ts = GRIDS["logsnr"](vp, 20)
ours, theirs = (solve(problem, noise, solver=method, ts=ts).x for method in (StraightLine(), "dpmpp_2m_heun"))
assert torch.allclose(ours, theirs, atol=1e-12)
print(SOLVERS["dpmpp_2m_heun"].reference)

# %% [markdown]
# ## 4 · Break it on purpose
#
# Seven small mistakes, each of which somebody has made. Each is one place of `step`, changed:

# %%
mistakes = {
    "1 % too much": ("(path.alpha(s), moved)", "(1.01 * path.alpha(s), moved)"),
    "half the slope": ("/ (lam - state.lam)", "/ (2 * (lam - state.lam))"),
    "all steps alike": ("/ (lam - state.lam)", "/ h"),
    "deaf to time": ("problem.predict(x, t)", "problem.predict(x, 0 * t + 0.5)"),
    "never forgets": ("problem.predict(x, t).x0", "cache.setdefault((float(t), x.shape), problem.predict(x, t).x0)"),
    "sees its batch": ("(x, t).x0", "(x, t).x0.clamp(-2 * x.std(), 2 * x.std())"),
    "asks twice": ("x0 = problem", "problem.predict(x, t)\n    x0 = problem"),
}


def altered(old, new):
    """StraightLine with one place of its step changed."""
    source, space = textwrap.dedent(inspect.getsource(StraightLine.step)), {**globals(), "cache": {}}
    assert source.count(old) == 1
    exec(source.replace(old, new), space)
    return type("Broken", (StraightLine,), {"step": space["step"]})()


broken = {name: altered(*change) for name, change in mistakes.items()}
certificates = {"right": certificate} | {
    name: certify(method, problems, answers=answers) for name, method in broken.items()
}
for name, found in certificates.items():
    failed = sum(not check.passed for check in found.checks)
    print(f"{name}: {failed} of {len(found.checks)} checks fail", *found.findings, sep="\n    ")
    assert found.passed == (name == "right")


# %% tags=["hide-input"]
def line(check):
    """What was checked, the paths of one grid together."""
    return re.sub(r"(order \d), [\w/]+, (\w+)", r"\1, \2 grid", check.what)


lines = list(dict.fromkeys(map(line, certificate.checks)))
with style.style():
    figure = Figure((11, 5.6), layout="constrained")
    axes = figure.subplots()
    for row, what in enumerate(lines):
        axes.axhline(row, color="#efede7", lw=0.8, zorder=0.5)
        for column, found in enumerate(certificates.values()):
            seen = [check.passed for check in found.checks if line(check) == what]
            if seen:
                marker, size, color = ("o", 5, "#c9c6bd") if all(seen) else ("X", 9, COLORS["rust"])
                axes.plot(column, row, marker, ms=size, color=color)
    axes.set_yticks(range(len(lines)), lines)
    axes.set_xticks(
        range(len(certificates)), [name.replace("1 %", "1%").replace(" ", "\n", 1) for name in certificates]
    )
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelcolor=INK)
    axes.spines[:].set_visible(False)
    axes.grid(visible=False)
    axes.set(ylim=(len(lines) - 0.5, -0.5), xlim=(-0.5, len(certificates) - 0.5))
figure

# %% [markdown]
# A dot is a check that holds, a cross one that does not. Would you have noticed without? Here is the error against the
# number of steps:

# %%
steps = (5, 10, 20, 40, 80, 160, 320)
shown = {"right": StraightLine(), **{name: broken[name] for name in list(broken)[:4]}, "DDIM": MyDDIM()}


def error(method, n):
    z = solve(problem, noise, solver=method, steps=n, grid="sqrt_flow").x
    return float((z - answer).square().sum(1).mean().sqrt())


errors = {name: [error(method, n) for n in steps] for name, method in shown.items()}
assert errors["1 % too much"][-1] > 100 * errors["right"][-1]

# %% tags=["hide-input"]
plots.lines(
    [
        Panel(
            {name: Series(steps, values) for name, values in errors.items()},
            "At ten steps little is to be seen; the slope tells",
            "steps",
            "error",
            log="xy",
            ticks=(steps, ()),
        )
    ],
    size=(8, 3.8),
)

# %% [markdown]
# With ten steps one cannot tell the right solver from most of the wrong ones, and their samples look fine. But one per
# cent too much goes to the *wrong limit*: more steps do not help. Half the slope is a method of order 1
# that costs what a method of order 2 costs. And the one that takes all steps for equally long is *right on this grid*,
# because on a smooth grid neighbouring steps become equal; the uneven grid finds it out.
#
# ## 5 · With noise
#
# For the reverse SDE, hold $\hat x_0$ fixed and integrate exactly:
#
# $$ z_s = \frac{\sigma_s}{\sigma_t}\,e^{-h} z_t + \alpha_s\left(1-e^{-2h}\right)\hat x_0
#        + \sigma_s\sqrt{1-e^{-2h}}\;\xi, \qquad \xi\sim\mathcal N(0,I). $$
#
# `noise(a, b)` is the increment of the Brownian motion between two values of $\lambda$, scaled to unit variance. All
# stochastic solvers get theirs from the same motion, so their errors can be measured path by path.


# %%
@dataclass(frozen=True)
class MySDE(Solver[None]):
    """The reverse SDE with the guess of the datum held for a step."""

    excess: float = 1.0  # factor on the noise; 1 is right

    order = 1
    nfe_per_step = 1
    stochastic = True
    invariant = True

    def step(self, problem, x, t, s, state, noise):
        path = problem.path
        lam, target = path.logsnr(t) / 2, path.logsnr(s) / 2
        h = target - lam
        fresh = -torch.expm1(-2 * h.abs())
        if h < 0:  # to the noise: the forward process
            keep = path.alpha(s) / path.alpha(t)
            return mix((keep, x), (path.sigma(s) * fresh.sqrt(), noise(lam, target))), state
        x0 = problem.predict(x, t).x0
        keep = path.sigma(s) / path.sigma(t) * torch.exp(-h)
        shake = self.excess * path.sigma(s) * fresh.sqrt()
        return mix((keep, x), (path.alpha(s) * fresh, x0), (shake, noise(lam, target))), state


right, wrong = certify(MySDE(), {"vp": problem}), certify(MySDE(excess=1.02), {"vp": problem})
print(right)
assert right.passed
assert not wrong.passed

# %% [markdown]
# The certificate needs no Monte Carlo: on Gaussian data a step is affine in the state and in the noises, so mean and
# variance of the result are linear algebra. Two per cent too much noise, which no picture shows, stands out:

# %%
print(*wrong.findings, sep="\n")

# %% [markdown]
# ## 6 · Is it any good?
#
# That it is right does not mean that it is good. Sixteen dimensions, ten calls, the same noise for all:

# %%
truth = sdegen.oracle("mixture16")
target = truth.problem(sdegen.VP())
start = prior(target.path, (32 if FAST else 128, 16), seed=0, **f64)
goal = exact(target, start)
entries = {"StraightLine (ours)": StraightLine(), "MyDDIM (ours)": MyDDIM()}
entries |= {name: SOLVERS[name] for name in ("euler", "heun", "edm_heun", "dpmpp_2m", "unipc_2", "exp_adams_3")}
ranked = {}
for name, method in entries.items():
    z = solve(target, start, solver=method, nfe=10, grid="sqrt_flow").x
    ranked[name] = float((z - goal).norm(dim=1).median())
look = looks(list(entries))
plots.dots(
    [Dot(n, e, look=look[n], text=f"{e:.3f}") for n, e in sorted(ranked.items(), key=lambda item: item[1])],
    title="Median error in sixteen dimensions, ten network calls",
    xlabel="median distance from the exact solution",
    log=True,
    xlim=(min(ranked.values()) / 1.5, 4 * max(ranked.values())),
    size=(8, 2.8),
)

# %% [markdown]
# ## 7 · Use it
#
# Wherever a solver goes by name, yours goes too: as an object, or as `"mine.py:StraightLine"`, or as
# `"mypackage.solvers:StraightLine"`, or by a name of its own where an installed package offers it (entry point
# `sdegen.solvers`).
#
# ```python
# model.sample(64, solver=StraightLine(), nfe=20)
# solve(problem, x, solver="mine.py:StraightLine", steps=20)
# ```
#
# ```
# sdegen verify mine.py:StraightLine                                # the certificate
# sdegen sample runs/digits --solver mine.py:StraightLine --nfe 20
# sdegen compare mixture16 --solvers mine.py:StraightLine,dpmpp_2m,unipc_2
# ```
