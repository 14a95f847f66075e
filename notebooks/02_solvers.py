# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 2 · Solvers
#
# A trained diffusion is a field of arrows, and sampling is to follow them from noise to data. Each look at the field
# is a call of the network, and calls are what sampling costs. **How does one follow the arrows well in few looks?**
#
# We stay in the plane, with data whose field is known exactly. Then every error that is seen is the solver's, and
# everything can be drawn. [Notebook 1](01_from_autoencoder_to_sde.ipynb) says where the field comes from; the pair
# $(\hat x_0, \hat\epsilon)$ is the guess of datum and noise in $z_t=\alpha_t x+\sigma_t\epsilon$.

# %% tags=["hide-input", "setup"]
import os
from itertools import pairwise

import numpy as np
import torch
from matplotlib.figure import Figure

import sdegen
from sdegen import plots, style
from sdegen.comparison import sliced_wasserstein
from sdegen.plane import Plane, field, planes, raster
from sdegen.plots import Dot, Panel, Series
from sdegen.solver_plots import heat_map
from sdegen.style import COLORS, GREY, INK, Look, looks
from solvers import GRIDS, SOLVERS, SDEDPMSolverPP1, optimize_grid, prior, solve, trace
from solvers.certify import exact

style.notebook()
torch.set_num_threads(1)
torch.manual_seed(0)
f64 = {"dtype": torch.float64}
FAST = bool(os.environ.get("SDEGEN_FAST"))  # the same in small

# %% [markdown]
# ## 1 · The field
#
# The probability-flow ODE carries noise to data without any randomness. With $f=d\log\alpha/dt$ and
# $g^2=-\sigma^2\,d\,\mathrm{logsnr}/dt$,
#
# $$ \frac{dz}{dt} \;=\; f\,z + \frac{g^2}{2\sigma}\,\hat\epsilon(z,t), \qquad t \text{ from } 1 \text{ to } 0. $$

# %%
mixture, path = sdegen.oracle("mixture2d"), sdegen.VP()
problem = mixture.problem(path)  # a path and a function (z, t) -> (x0, eps): all that a solver is given
noise = prior(path, (64 if FAST else 256, 2), seed=0, **f64)
answer = exact(problem, noise)  # where the ODE leads, to eleven digits

# %% tags=["hide-input"]
levels = {logsnr: path.time(torch.tensor(logsnr, **f64)) for logsnr in (-4.0, 0.0, 3.0)}
panels = [
    Plane(
        f"logsnr = {logsnr:g}".replace("-", "−"),
        raster(lambda z, t=t: mixture.log_prob_t(z, path, t).exp(), size=100),
        field(lambda z, t=t: -problem.velocity(z, t), size=14),
    )
    for logsnr, t in levels.items()
]
shade = raster(lambda z: mixture.log_prob_t(z, path, path.t_min).exp())
lines = solve(problem, noise[:28], solver="rk4", steps=80, save="all").xs
planes([*panels, Plane("Lines of the flow", shade, paths=lines)])

# %% [markdown]
# (Arrows point the way samples go, darker where they go faster.) Noise drifts as one cloud at first, then divides.
# Nearly all decisions fall in between, and that is where a solver has to look.
#
# ## 2 · One step at a time
#
# Euler's method believes each arrow for a while. In a line: $z_s = z_t + (s-t)\,\text{velocity}(z_t,t)$. Errors here
# are *medians*: a few starts lie on the watershed between two clusters, where the smallest error decides to which one
# goes, and a mean would tell of those alone.


# %%
def euler(z, ts):
    for t, s in pairwise(ts):
        z = z + (s - t) * problem.velocity(z, t)
    return z


def error(z):
    """Median distance from the exact end."""
    return float((z - answer).norm(dim=1).median())


ts = GRIDS["vp_quadratic"](path, 10)  # eleven times from 1 to 0, denser near the data
assert torch.allclose(euler(noise, ts), solve(problem, noise, solver="euler", ts=ts).x)
print(solve(problem, noise, solver="euler", steps=10))

# %% tags=["hide-input"]
hard = (solve(problem, noise, solver="euler", steps=4).x - answer).norm(dim=1).argsort(descending=True)
chosen = noise[hard[[0, 2, 5, 9, 14, 20]]]
smooth = solve(problem, chosen, solver="rk4", steps=80, save="all").xs
panels = []
for steps in (4, 8, 16):
    walk = solve(problem, chosen, solver="euler", steps=steps, save="all").xs
    off = error(solve(problem, noise, solver="euler", steps=steps).x)
    panels.append(Plane(f"Euler, {steps} steps", shade, paths=smooth, steps={"": walk}, note=f"error {off:.3f}"))
planes(panels, reach=1.6)

# %% [markdown]
# Every step leaves the curve by a little, and the curve does not wait.
#
# ## 3 · Order
#
# Halve the steps: how much smaller is the error? Euler's falls by 2. *Heun's* method looks where Euler would arrive,
# and goes by the mean of both arrows: its error falls by 4. In general $\text{error} \approx C h^p$, and $p$ is the
# **order**. It is a property of the coefficients, and a single wrong one destroys it, so it is the best test that a
# solver is what it says (see [notebook 4](04_write_your_own_solver.ipynb)).

# %%
steps = [5, 10, 20, 40, 80, 160]
methods = ["euler", "heun", "bosh3_fixed", "rk4"]
fixed = {name: [solve(problem, noise, solver=name, steps=n) for n in steps] for name in methods}
errors = {name: [error(run.x) for run in runs] for name, runs in fixed.items()}
for name, values in errors.items():
    order = np.log2(values[-2] / values[-1])
    print(f"{name:12} declares order {SOLVERS[name].order}, measured {order:.2f}")
    assert abs(order - SOLVERS[name].order) < 0.25

# %% tags=["hide-input"]
look = looks(methods)
plots.lines(
    [
        Panel(
            {name: Series(steps, values) for name, values in errors.items()},
            "Error against steps: the slope is the order",
            "steps",
            "error",
            log="xy",
            look=look,
            ticks=(steps, ()),
        ),
        Panel(
            {name: Series([run.nfe for run in fixed[name]], values) for name, values in errors.items()},
            "The same, against what it cost",
            "network calls",
            "error",
            log="xy",
            look=look,
            ticks=((5, 10, 20, 50, 100, 200, 500), ()),
        ),
    ],
    size=(11, 3.6),
)

# %% [markdown]
# A fourth-order step costs four calls. That pays off when small errors are wanted; with ten calls in all, there is
# little between them. To do better with few calls, one has to know something about the problem.
#
# ## 4 · Follow what is simple
#
# The state moves a lot along its path, and most of that is known: without a single call we know that it must shrink
# its noise and grow its signal. What must be *asked* is only the guess $\hat x_0$. With
# $\lambda=\tfrac12\mathrm{logsnr}$, the exact solution between two times is
#
# $$ z_s = \frac{\sigma_s}{\sigma_t}\,z_t + \sigma_s\int_{\lambda_t}^{\lambda_s} e^{\lambda}\,\hat x_0\,d\lambda . $$

# %% tags=["hide-input"]
fine = GRIDS["logsnr"](path, 200)
along = solve(problem, noise[[1, 5, 9, 14, 26]], solver="rk4", ts=fine, save="all").xs
guesses = torch.stack([problem.predict(z, t).x0 for z, t in zip(along, fine, strict=True)])
lam = path.logsnr(fine) / 2
plain = {str(i): Look(color, "", "-") for i, color in enumerate(list(COLORS.values())[:5])}


def first(values):
    return {str(i): values[:, i, 0] for i in range(5)}


panels = {
    "The state, along time": (fine, first(along), "time t"),
    "The state, along λ": (lam, first(along), "λ"),
    "What must be asked: the guess of x": (lam, first(guesses), "λ"),
}
figure = plots.lines(
    [
        Panel({i: Series(x, y) for i, y in curves.items()}, title, xlabel, look=plain, labels="", ylim=(-2, 2))
        for title, (x, curves, xlabel) in panels.items()
    ],
    size=(11, 3),
)
figure.axes[0].invert_xaxis()
figure

# %% [markdown]
# (First coordinate of five samples; noise at the left, data at the right.) The guess begins at the mean of everything,
# makes up its mind, and stays. **Hold it for a step**, and the integral is elementary:
#
# $$ z_s = \alpha_s\,\hat x_0 + \sigma_s\,\hat\epsilon . $$
#
# This is *DDIM*: split the state into signal and noise, and put it together again for the next level. How the path
# scales its states makes no difference to it. To plain Euler it makes a great one:

# %%
ts = GRIDS["logsnr"](path, 12)
t, s = ts[4], ts[5]
x0, eps = problem.predict(noise, t)
ddim = solve(problem, noise, solver="ddim", ts=torch.stack([t, s])).x
assert torch.allclose(ddim, path.alpha(s) * x0 + path.sigma(s) * eps)

for name in ("ddim", "euler"):
    ends = {}
    for curve in ("vp", "flow", "ve"):  # the same noise levels at the same times, other scalings of z
        other = path.on(curve)
        start = other.sigma(path.t_max) / path.sigma(path.t_max) * noise
        found = solve(mixture.problem(other), start, solver=name, ts=ts).x
        ends[curve] = path.alpha(path.t_min) / other.alpha(path.t_min) * found
    print(f"{name:6}", ", ".join(f"{curve}: error {error(z):.4f}" for curve, z in ends.items()))
    apart = max(float((ends["vp"] - ends[curve]).abs().max()) for curve in ("flow", "ve"))
    assert apart < 1e-10 if name == "ddim" else apart > 0.1

# %% [markdown]
# ## 5 · Remember
#
# Between two steps the guess moves, and the *last* guess says in which direction. A **multistep** method draws the line
# through the last two guesses (or a parabola through three) and integrates that. It costs one call per step, like
# DDIM, and has a higher order. Which guess has a say in which step can be looked at:

# %%
table = trace("dpmpp_2m", path, GRIDS["sqrt_flow"](path, 10))
heat_map(table)

# %% [markdown]
# At the left, what each step of DPM-Solver++(2M) adds: a diagonal and its neighbour, *the newest guess with a weight
# above one, the last with a negative one*, which is extrapolation. At the right, what each state is made of in the end.

# %%
contest = ["euler", "ddim", "heun", "rk4", "dpmpp_2m", "unipc_2", "vab_3"]
budgets = (5, 8, 12, 20, 32, 50)
found = {
    name: [solve(problem, noise, solver=name, nfe=nfe) for nfe in budgets if SOLVERS[name].nfe(1) <= nfe]
    for name in contest
}
at20 = {name: min(error(run.x) for run in runs if run.nfe <= 20) for name, runs in found.items()}
assert at20["dpmpp_2m"] < at20["ddim"] / 3

# %% tags=["hide-input"]
plots.lines(
    [
        Panel(
            {name: Series([run.nfe for run in runs], [error(run.x) for run in runs]) for name, runs in found.items()},
            "With few calls memory wins, with many order",
            "network calls",
            "error",
            log="xy",
            ticks=(budgets, ()),
        )
    ],
    size=(8.5, 4),
)

# %% [markdown]
# Heun looks twice for each step; DPM-Solver++(2M) remembers, and makes twice as many steps with the same calls. The
# fourth-order `rk4` needs some dozen calls before its order tells.
#
# ## 6 · Where to put the steps
#
# A budget of ten calls is ten places to look. Uniform in time, in logsnr, or in something between? Below, each row is a
# *grid*: ticks are its nodes on the axis of logsnr, and the number is the error of DPM-Solver++(2M) that looks there.
# The last row was found by measuring: `optimize_grid` moves the nodes until the mean square error, on other noises, is
# least.

# %%
others = prior(path, (64, 2), seed=1, **f64)
best = optimize_grid(problem, "dpmpp_2m", 10, x=others, measure="rms", iterations=4 if FAST else 15)
grids = {name: GRIDS[name] for name in ("uniform", "logsnr", "karras", "vp_quadratic", "sqrt_flow")} | {
    "optimised": best
}
placed = {name: solve(problem, noise, solver="dpmpp_2m", nfe=10, grid=grid) for name, grid in grids.items()}
off = {name: float((run.x - answer).square().sum(1).mean().sqrt()) for name, run in placed.items()}
assert off["optimised"] < off["uniform"]

# %% tags=["hide-input"]
with style.style():
    figure = Figure((9.5, 2.9), layout="constrained")
    axes = figure.subplots()
    for row, (name, run) in enumerate(placed.items()):
        axes.axhline(row, color="#efede7", lw=0.8, zorder=0.5)
        axes.plot(path.logsnr(run.ts), [row] * len(run.ts), "|", color=INK, ms=13, mew=1.4)
        axes.text(1.01, row, f"{off[name]:.3f}", transform=axes.get_yaxis_transform(), va="center")
    axes.text(1.01, -0.9, "rms error", transform=axes.get_yaxis_transform(), color=GREY, va="center")
    axes.set_yticks(range(len(placed)), list(placed))
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False, axis="y")
    axes.set(ylim=(len(placed) - 0.5, -0.7), xlabel="logsnr (noise at the left, data at the right)")
figure

# %% [markdown]
# The same method, the same ten calls. Where one looks matters as much as how; `solve` uses for each family of solvers
# the grid that was measured to suit it, unless told otherwise.
#
# ## 7 · With noise
#
# The ODE is one member of a family. For every amount of noise $\eta\ge0$,
#
# $$ dz = \left[f z - \tfrac{1+\eta^2}{2}\,g^2\,\nabla\log q(z_t)\right]dt + \eta\,g\,dW $$
#
# passes through the same densities. The ODE takes one noise to one datum. With $\eta>0$, one noise may become anything:

# %%
start = noise[14:15].expand(300, 2)
finals = {eta: solve(problem, start, solver=SDEDPMSolverPP1(eta), steps=100, seed=0).x for eta in (0.0, 0.3, 1.0)}
spread = [float(z.std(0).norm()) for z in finals.values()]
assert spread[0] < 1e-9 < spread[1] < spread[2]

# %% tags=["hide-input"]
panels = []
for eta, z in finals.items():
    walks = solve(problem, start[:2], solver=SDEDPMSolverPP1(eta), steps=100, seed=0, save="all").xs
    panels.append(Plane(f"η = {eta:g}", shade, points=z, **{"twins" if eta else "paths": walks}))
planes(panels, reach=2.1)

# %% [markdown]
# Whole clouds, though, are the same, up to what two samples differ anyway. (A cloud needs no Brownian motion that could
# be followed from solver to solver; fresh noise for each step is cheaper.)

# %%
n = 600 if FAST else 3000
clean = [path.alpha(path.t_min) * mixture.sample(n, seed=seed) for seed in (1, 2, 3)]
floor = max(sliced_wasserstein(a, b) for a, b in ((clean[0], clean[1]), (clean[0], clean[2]), (clean[1], clean[2])))
many = prior(path, (n, 2), seed=2, **f64)


def fresh(a, b):
    return torch.randn(n, 2, **f64)


def distance(eta, steps, start=many):
    cloud = solve(problem, start, solver=SDEDPMSolverPP1(eta), steps=steps, noise=fresh).x
    return sliced_wasserstein(cloud, clean[0])


etas = (0.0, 0.3, 0.6, 1.0, 1.5)
steps = (5, 10, 20, 40, 80)
by_cost = {eta: [distance(eta, n) for n in steps] for eta in (0.0, 0.6, 1.5)}
wrong = 0.5 * many + torch.tensor([0.6, 0.0], **f64)  # as if the noise were narrower, and off centre
right_start, wrong_start = ([distance(eta, 80, z) for eta in etas] for z in (many, wrong))
print("distance from data for η =", etas)
print("  from noise:      ", ", ".join(f"{value:.3f}" for value in right_start), f"(two exact samples: {floor:.3f})")
print("  from wrong noise:", ", ".join(f"{value:.3f}" for value in wrong_start))
assert wrong_start[-1] < wrong_start[0] / 3

# %% tags=["hide-input"]
band = (0.0, floor, "two exact samples")
plots.lines(
    [
        Panel(
            {f"η = {eta:g}": Series(steps, values) for eta, values in by_cost.items()},
            "Noise costs steps ...",
            "steps",
            "distance from data",
            log="xy",
            ticks=(steps, ()),
            floor=band,
        ),
        Panel(
            {"right start": Series(etas, right_start), "wrong start": Series(etas, wrong_start)},
            "... and forgets mistakes",
            "amount of noise η",
            "distance from data, 80 steps",
            floor=band,
        ),
    ],
    size=(11, 3.5),
)

# %% [markdown]
# **When does noise help?** When something is wrong on the way. The ODE carries every mistake, of the start or of the
# network, faithfully to the end. Noise makes the state forget where it was, and the score pulls it to where it should
# be. When nothing is wrong and calls are few, it only asks for more steps.
#
# **Errors on one path.** All stochastic solvers here see the same Brownian motion, whatever the grid. So a path can be
# *refined*, and its error measured like that of an ODE:

# %%
one = noise[3:4]
reference = solve(problem, noise[:24], solver=SDEDPMSolverPP1(1.0), steps=640, grid="logsnr", seed=4).x
strong = []
for steps in (20, 40, 80):
    z = solve(problem, noise[:24], solver=SDEDPMSolverPP1(1.0), steps=steps, grid="logsnr", seed=4).x
    strong.append(float((z - reference).square().sum(1).mean().sqrt()))
print("error on one Brownian path with 20, 40 and 80 steps:", ", ".join(f"{value:.4f}" for value in strong))
assert strong[-1] < strong[0] / 2.5

# %% tags=["hide-input"]
refined = {
    steps: solve(problem, one, solver=SDEDPMSolverPP1(1.0), steps=steps, grid="logsnr", seed=4, save="all").xs
    for steps in (10, 40, 640)
}
panels = [Plane(f"{k} steps, and 640", shade, twins=refined[640], steps={"": refined[k]}) for k in (10, 40)]
planes([*panels, Plane("640 steps", shade, paths=refined[640])], reach=2.1)

# %% [markdown]
# ## 8 · Let the solver choose
#
# An *adaptive* method takes each step twice, with two orders, and lets their difference say how long the next step may
# be. One gives it a tolerance in the place of a number of steps, and each sample gets steps of its own:

# %%
tols = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
adaptive = {tol: solve(problem, noise, solver="dopri54", tol=tol) for tol in tols}
for tol, run in adaptive.items():
    print(f"tolerance {tol:.0e}: error {error(run.x):.1e}, {run.spent.min():.0f} to {run.spent.max():.0f} calls")
assert error(adaptive[1e-6].x) < 1e-4
spent = adaptive[1e-4].spent

# %% tags=["hide-input"]
with style.style():
    figure = Figure((11, 3.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.9])
planes([Plane("Where noise is hard to carry", shade)], reach=2.5, on=left)
with style.style():
    dots = left.axes[0].scatter(*noise.T, c=spent, cmap="Greys", s=11, edgecolors=INK, linewidths=0.3)
    left.colorbar(dots, ax=left.axes[0], shrink=0.7, label="calls, at tolerance 10⁻⁴").outline.set_visible(False)
calls, off = [run.nfe for run in adaptive.values()], [error(run.x) for run in adaptive.values()]
curves = {"dopri54, adaptive": Series(calls, off), "rk4": Series([run.nfe for run in fixed["rk4"]], errors["rk4"])}
plots.lines(
    [
        Panel(
            curves, "Adaptive and fixed steps", "network calls", "error", log="xy", ticks=((20, 50, 100, 200, 500), ())
        )
    ],
    on=right,
)
figure

# %% [markdown]
# Adaptivity does not buy speed here; it buys *control*. One says how exact the result is to be, and gets it without
# knowing the problem.
#
# ## 9 · Which one, then?
#
# With ten calls, on this problem:

# %%
entries = ["euler", "ddim", "heun", "edm_heun", "dpmpp_2m", "dpmpp_3m", "unipc_2", "deis_tab3", "exp_adams_3", "vab_3"]
ranked = {}
for name in entries:
    run = solve(problem, noise, solver=name, nfe=10)
    ranked[name] = error(run.x), run.nfe
ranked = dict(sorted(ranked.items(), key=lambda item: item[1][0]))
look = looks(entries)
plots.dots(
    [Dot(name, value, look=look[name], text=f"{value:.3f}") for name, (value, _) in ranked.items()],
    title="Error with at most ten network calls",
    xlabel="error",
    log=True,
    xlim=(0.01, 3),
    size=(7.5, 3.2),
)

# %% [markdown]
# On images, on other data, with another budget, the order will be another. So measure on *your* problem; that is what
# `sdegen compare` does, with error bars and for all solvers at once. `sdegen solvers` lists them.
#
# ## What you know now
#
# - A sampler follows a field; its **order** says how fast its error falls, and can be measured.
# - At few calls three things matter more than order: **ask only for what is unknown** (the guess $\hat x_0$),
#   **remember** the last answers, and **look in the right places**.
# - **Noise** makes the sampler forget mistakes, and asks for more steps. Without mistakes, the ODE is cheaper.
# - **Adaptive** methods turn a tolerance into steps, for each sample by itself.
#
# Next: how likely are the data? [Notebook 3](03_likelihood.ipynb). Or
# [write a solver of your own](04_write_your_own_solver.ipynb).
