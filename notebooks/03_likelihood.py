# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 3 · Likelihood
#
# *How likely are these data under this model?* One number, which decides which of two models is better. There are half
# a dozen ways to get it, they do not give the same number, and most of the ways to get it wrong look like progress.
#
# So we compute it where **the truth is known**: mixtures of Gaussians, whose density is a formula. The network is
# replaced by the exact denoiser, and whatever is off is the estimator's fault.

# %% tags=["hide-input", "setup"]
import math
import os

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

import sdegen
from sdegen import likelihood_plots, plots, style
from sdegen.decoders import GaussianDecoder, GaussianHead, SoftmaxDecoder
from sdegen.likelihood import Exact, Hutchinson, denoising_profile
from sdegen.likelihood.dequantize import Uniform
from sdegen.models import pixel_histogram
from sdegen.oracles import PixelOracle
from sdegen.paths import LinearLogSNR
from sdegen.plots import Dot, Panel, Series
from sdegen.style import COLORS, GREY, INK, MODELS
from solvers import ODE, solve

style.notebook()
torch.set_num_threads(1)
torch.manual_seed(0)
f64 = {"dtype": torch.float64}
FAST = bool(os.environ.get("SDEGEN_FAST"))  # the same in small

# %% [markdown]
# ## 1 · Every estimator, and the truth
#
# Three ways, for one model (see [notebook 1](01_from_autoencoder_to_sde.ipynb) for what they are):
#
# * **the bound of a DDPM** with $T$ levels, an upper bound on $-\log p(x)$ that falls with $T$;
# * **the bound of the VP-SDE**, its limit: an integral over noise levels, estimated from random ones;
# * **the probability-flow ODE**, $\log p(z_0) = \log p(z_1) + \int \mathrm{div}\,dt$: no bound, the thing itself. Its
#   divergence is the trace of a Jacobian, *exact* with one product for each dimension, or *estimated* from random
#   vectors of signs $v$, because $\mathbb E\,v^{\!\top}\! J v=\mathrm{tr}\,J$ (Hutchinson).
#
# Data in sixteen dimensions. The answer of each is a report, and an evaluation is a table of them:

# %%
truth = sdegen.oracle("mixture16")
model = sdegen.VPSDE(truth, sdegen.VP(LinearLogSNR(15, -12)))  # the exact denoiser in the place of a network
x = truth.sample(40 if FAST else 200, seed=1)
exact = -truth.log_prob(x)

methods = {
    "DDPM, T = 300": "bound(T=300)",
    "DDPM, T = 1000": "bound(T=1000)",
    "VP-SDE": "bound",
    "ODE, two probes": "ode(probes=2)",
    "ODE, exact trace": "ode(tol=1e-5)",
}
found = sdegen.evaluate(model, x, methods=methods)
print(f"exact: {exact.mean():.4f} nats\n")
print(found)

# %%
rows = []
for title, report in found.reports.items():
    off = float((report.values - exact).mean())
    noise = report.estimator_se + (report.solver_error or 0.0)
    rows.append((title, off, noise, report))
    allowed = 4 * noise + 0.02  # and what the two ends of the path leave
    assert off > -allowed if report.kind == "upper bound" else abs(off) < allowed

# %% tags=["hide-input"]
look = {"D": MODELS["DDPM"], "V": MODELS["VP-SDE"], "O": MODELS["ODE"]}
plots.dots(
    [Dot(title, off, noise, 2 * noise, look[title[0]], f"{off:+.3f} ± {noise:.3f}") for title, off, noise, _ in rows],
    title="Nats above the truth, one and two standard errors",
    marks={"truth": 0.0},
    xlabel="nats per example, in sixteen dimensions",
    xlim=(-0.5, 1.15 * max(off for _, off, *_ in rows) + 1.0),
    size=(8, 2.7),
)

# %% [markdown]
# A bound with few levels is loose and says so: it is *above*. The limit, and the ODE, are the truth within their
# errors. But look at what they cost.
#
# ## 2 · What an error bar means
#
# **Two errors, which must never be added.** The *estimator's* comes from the noise that was drawn, and goes away with
# more draws. The *data's* comes from the examples that happened to be held out, and goes away only with more data. To
# compare two models on the same examples, the first counts; to speak of all data, the second.
#
# An error bar is a promise: in 95 of 100 repetitions the value lies within two of them from its mean. Keep it? Here are
# repetitions with other seeds.

# %%
few = x[:16]
repeats = [sdegen.bound(model, few, draws=8, seed=seed) for seed in range(100 if FAST else 400)]
values, errors = (torch.tensor([getattr(r, name) for r in repeats]) for name in ("nats", "estimator_se"))
z = (values - values.mean()) / errors
print(f"spread of (value - mean) / error: {z.std():.2f} (promised: 1)")
print(f"within two errors: {100 * float((z.abs() < 2).double().mean()):.0f} % (promised: 95 %)")
assert 0.7 < float(z.std()) < 1.4

# %% tags=["hide-input"]
with style.style():
    figure = Figure((11, 3.3), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[2.2, 1])
    centre = float(values.mean())
    for i in range(40):
        hit = abs(z[i]) < 2
        color, marker = (INK, "o") if hit else (COLORS["rust"], "X")
        left.plot([i, i], [values[i] - 2 * errors[i], values[i] + 2 * errors[i]], color=color, lw=1.1)
        left.plot(i, values[i], marker, color=color, ms=4 if hit else 7, markeredgecolor="white", markeredgewidth=0.5)
    left.axhline(centre, color=GREY, lw=0.8, ls=(0, (2, 2)))
    left.set(title="Forty repetitions with two standard errors", xlabel="seed", ylabel="nats")
    at = torch.linspace(-4, 4, 100)
    right.hist(z, bins=np.linspace(-4, 4, 25), density=True, color="#c5cad9", edgecolor="white")
    right.plot(at, torch.exp(-0.5 * at**2) / math.sqrt(2 * math.pi), color=COLORS["indigo"])
    right.set(title="All of them, and N(0, 1)", xlabel="(value − mean) / error", yticks=[])
figure

# %% [markdown]
# **Compare on the same noise.** Two models on the same examples share most of what is random. The error of their
# *difference* can be many times smaller than that of either:

# %%
apart, error = found.gap("DDPM, T = 1000", "VP-SDE")
one, other = found["DDPM, T = 1000"], found["VP-SDE"]
naive = math.hypot(one.estimator_se, one.data_se, other.estimator_se, other.data_se)
print(f"T = 1000 instead of ∞ costs {apart:.3f} ± {error:.3f} nats; from two numbers alone: ± {naive:.2f}")
assert error < naive

# %% [markdown]
# ## 3 · What precision costs
#
# The bound is a mean over random noise levels and noises. Drawn independently, its error falls like
# $1/\sqrt{\text{calls}}$, and starts high, because some levels matter much more than others. Two remedies, which change
# the noise and never the mean: *stratify* (each draw gets its own share of the levels), and subtract a *control
# variate*: the error that the best **linear** denoiser makes with the same noise, which costs no call, and whose mean
# is a formula.

# %%
ways = {
    "independent": lambda calls: {"draws": 1, "repeats": calls, "control": None},
    "stratified": lambda calls: {"draws": calls // 2, "repeats": 2, "control": None},
    "and control variate": lambda calls: {"draws": calls // 2, "repeats": 2},
}
budgets = (8, 32, 128) if FAST else (8, 32, 128, 512)
spent = {name: [sdegen.bound(model, few, **way(n)) for n in budgets] for name, way in ways.items()}
last = {name: reports[-1].estimator_se for name, reports in spent.items()}
gain = (last["independent"] / last["and control variate"]) ** 2
print(f"with {budgets[-1]} calls the control variate is worth {gain:.0f} times as many independent draws")
assert last["and control variate"] < last["stratified"] < last["independent"]
asked = sdegen.bound(model, few, target_se=0.2)  # or say how precise it is to be
print(f"asked for 0.2 nats: {asked.nats:.2f} ± {asked.estimator_se:.2f} after {asked.forward:.0f} calls per example")

# %% tags=["hide-input"]
series = {name: Series([r.forward for r in rs], [r.estimator_se for r in rs]) for name, rs in spent.items()}
panel = Panel(
    series, "The estimator's error against its cost", "network calls per example", "standard error, nats", log="xy",
    ticks=((10, 20, 50, 100, 200, 500), (0.05, 0.1, 0.2, 0.5, 1, 2, 5)),
)  # fmt: skip
plots.lines([panel], size=(8, 3.3))

# %% [markdown]
# For the ODE, the same idea: fresh vectors $v$ at every step average out, one vector that stays does not.

# %%
for name, trace in {
    "exact trace": Exact(),
    "two probes that stay": Hutchinson(2, redraw=False),
    "two fresh probes at every evaluation": Hutchinson(2),
}.items():
    report = sdegen.ode_likelihood(model, few, trace=trace, steps=24, solver="rk4", control=None)
    print(f"{name:>38}: {report.nats:.3f} ± {report.estimator_se:.3f} nats, {report.vjp:.0f} products per example")

# %% [markdown]
# ## 4 · Many latents: the importance-weighted bound
#
# For a VAE there is a better bound than the bound: draw $K$ latents and average their *weights*,
# $-\log\tfrac1K\sum_k p(x,z_k)/q(z_k\mid x)$. It tightens with $K$, at a price. Here is a linear VAE, whose likelihood
# is known, with encoders that guess the right mean, and widths that are half, once and twice what each coordinate would
# need by itself:

# %%
mixing, noise_std = torch.tensor([[1, 0.4], [0.8, 0.9], [0.5, 0.7], [0.9, 0.3], [0.4, 0.8], [0.7, 0.7]], **f64), 0.4
precision = torch.eye(2, **f64) + mixing.T @ mixing / noise_std**2
marginal = torch.distributions.MultivariateNormal(torch.zeros(6, **f64), mixing @ mixing.T + 0.16 * torch.eye(6, **f64))


class Guess(nn.Module):
    """The mean of the posterior, and a width that is `narrow` times the right one for independent coordinates."""

    def __init__(self, narrow):
        super().__init__()
        self.log_std = math.log(narrow) - 0.5 * precision.diag().log()

    def forward(self, x, cond=None):
        mean = x @ mixing @ torch.linalg.inv(precision) / noise_std**2
        return torch.cat([mean, self.log_std.expand_as(mean)], 1)


class Linear(nn.Module):
    def forward(self, z, cond=None):
        return z @ mixing.T


y = marginal.sample((50,))
vaes = {k: sdegen.VAE(Guess(k), Linear(), GaussianHead(noise_std), event_shape=(6,), latent=2) for k in (0.5, 1.0, 2.0)}
Ks = (1, 3, 10, 30, 100, 300)
tightened = {k: [sdegen.importance(vae, y, K) for K in Ks] for k, vae in vaes.items()}
known = -float(marginal.log_prob(y).mean())
for k, reports in tightened.items():
    end = reports[-1].settings
    print(f"width {k}: {reports[0].nats:.3f} with one latent, {reports[-1].nats:.3f} with {Ks[-1]}; exact {known:.3f};")
    print(f"   worth {end['ess_mean']:.0f} latents of equal weight; largest Pareto k {end['pareto_k_max']:.2f}")
    assert reports[0].nats > reports[-1].nats
    assert reports[-1].nats > known - 4 * reports[-1].estimator_se


# %% tags=["hide-input"]
def above(reports):
    """Nats above the truth with two standard errors."""
    value, error = (np.array([getattr(r, name) for r in reports]) for name in ("nats", "estimator_se"))
    return Series(Ks, value - known, value - known - 2 * error, value - known + 2 * error)


series = {f"width {k:g}": above(reports) for k, reports in tightened.items()}
panel = Panel(series, "Nats above the truth, with K latents", "K", "nats", log="x", marks={"": 0.0}, ticks=(Ks, ()))
plots.lines([panel], size=(8, 3))

# %% [markdown]
# An encoder that is too wide starts worse and ends better than one that is too narrow: what it misses, no number of
# draws brings back. *Pareto k* sees it. It says how heavy the tail of the weights is; above 0.7 a few of them decide,
# and neither the bound nor its error bar means much. The report then says so:

# %%
print(tightened[0.5][-1].note)
assert tightened[2.0][-1].nats < tightened[0.5][-1].nats

# %% [markdown]
# ## 5 · What goes wrong
#
# Each of these has been in published code. In each, the number looks fine.
#
# **(a) Fresh noise inside an adaptive solver.** If the probe changes at every evaluation, the right-hand side of the
# ODE is not a function. A solver that chooses its steps takes the jumps for stiffness, and makes its steps shorter
# until the jumps are as small as the tolerance: never.

# %%
plane = sdegen.oracle("mixture2d").problem(sdegen.VP())
points = sdegen.oracle("mixture2d").sample(4, seed=0)
cap = 600 if FAST else 3000


class TooMany(Exception):
    pass


def calls(tol, fresh):
    """Evaluations that an adaptive solve of state and log-density takes."""
    generator, counted = torch.Generator().manual_seed(0), 0
    kept = torch.randn(points.shape, generator=generator, **f64).sign()

    def velocity(state, t):
        nonlocal counted
        counted += 1
        if counted > cap:
            raise TooMany
        v = torch.randn(points.shape, generator=generator, **f64).sign() if fresh else kept
        value, pull = torch.func.vjp(lambda z: plane.velocity(z, t), state[:, :2])
        return torch.cat([value, (v * pull(v)[0]).sum(1, keepdim=True)], 1)

    start = torch.cat([points, torch.zeros(4, 1, **f64)], 1)
    try:
        solve(ODE(velocity, plane.t_min, plane.t_max), start, solver="dopri54", tol=tol, encode=True)
    except TooMany:
        return cap
    return counted


tols = (1e-2, 1e-3, 1e-4, 1e-5)
needed = {"kept": [calls(tol, False) for tol in tols], "fresh": [calls(tol, True) for tol in tols]}
print("calls at tolerances", tols, needed)
assert needed["fresh"][-1] == cap > 3 * needed["kept"][-1]
try:
    sdegen.ode_likelihood(model, few, trace=Hutchinson(1, redraw=True), tol=1e-4)
except ValueError as error:
    print("the library:", error)

# %% [markdown]
# **(b) Importance weights of a noisy density.** The mean of exponentials does not forgive noise: if $\log p$ is known
# up to noise of variance $s^2$, then with many draws $\log\tfrac1K\sum_k\hat p_k \to \log p + s^2/2$. Likelihood from
# nothing, and more of it with every draw:

# %%
draws = torch.randn(500 if FAST else 4000, 1000, **f64)
Ks = (1, 3, 10, 30, 100, 300, 1000)
bias = {s: [float(((s * draws[:, :K]).logsumexp(1) - math.log(K)).mean()) for K in Ks] for s in (0.5, 1.0, 2.0)}
for s, gained in bias.items():
    print(f"noise of {s} nats: {gained[-1]:+.2f} nats gained with K = 1000 (the limit is {s**2 / 2:+.2f})")
assert abs(bias[1.0][-1] - 0.5) < 0.05

# %% tags=["hide-input"]
with style.style():
    figure = Figure((11, 3.1), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 1.05])
one = {f"{name} probe": Series(tols, counted) for name, counted in needed.items()}
plots.lines(
    [Panel(one, f"(a) Calls of an adaptive solver (stopped at {cap})", "tolerance", "calls", log="xy")], on=left
)
left.axes[0].invert_xaxis()
two = {f"s = {s:g}": Series(Ks, gained) for s, gained in bias.items()}
plots.lines([Panel(two, "(b) Nats gained from noise alone", "K", "nats", log="x", ticks=(Ks, ()))], on=right)
figure

# %% [markdown]
# **(c) A density is no probability.** Data with grey levels have a code length; a density does not, until it is said
# how wide the levels are. Spread each level over its bin with noise (*dequantize*), and $\text{bits} =
# \text{nats}/(D\log2) - \log_2(\text{width})$. Forget the noise, or take the offset of somebody else's data, and any
# number may come out. Two pixels of 17 levels each, whose probabilities are known by integration:

# %%
bins = sdegen.Bins(17)
base = sdegen.oracle("mixture2d")
smooth = sdegen.MixtureOracle(base.weights, 0.45 * base.means, 0.45**2 * base.covs)  # inside [-1, 1]
inside = (torch.arange(20, **f64) + 0.5) / 20 - 0.5
edges = (bins.centers(torch.float64)[:, None] + bins.width * inside).flatten()
fine = smooth.log_prob(torch.cartesian_prod(edges, edges)).exp().reshape(17, 20, 17, 20)
P = fine.mean((1, 3)) * bins.width**2  # probability of each pair of levels
index = torch.multinomial(P.flatten(), 60 if FAST else 400, replacement=True)
levels = torch.stack([bins.centers(torch.float64)[index // 17], bins.centers(torch.float64)[index % 17]], 1)
code = -float(P.flatten()[index].log2().mean()) / 2

density = sdegen.VPSDE(smooth, sdegen.VP(LinearLogSNR(15, -10)))
right = sdegen.ode_likelihood(density, levels, dequantizer=Uniform(bins), tol=1e-4)
wrong = sdegen.ode_likelihood(density, levels, tol=1e-4)
numbers = {
    "exact code length": code,
    "dequantised, width 2/17": right.bits_per_dim,
    "not dequantised, width 2/17": wrong.in_bits(wrong.nats) - math.log2(bins.width),
    "not dequantised, no offset": wrong.in_bits(wrong.nats),
    "dequantised, offset 7 of bytes": right.bits_per_dim + math.log2(bins.width) + 7,
}
for name, value in numbers.items():
    print(f"{name:>32}: {value:+.3f} bits per pixel")
assert code - 4 * right.in_bits(right.estimator_se) < right.bits_per_dim < code + 0.5
assert wrong.bits_offset is None  # the library does not guess a width: asked for bits, it says nan

# %% [markdown]
# Only the second is a bound. The third happens to be near, and nothing keeps it above the truth.
#
# **(d) The clean end.** A model of grey levels learns to put sharp peaks on them: its density at a level is as high as
# the path is clean. Move the clean end of the path outwards, and "bits per pixel" from a density fall, and fall, far
# below what any code can do. A *discrete decoder* settles. (Below: independent pixels with the histograms of the
# digits, whose code length is known.)

# %%
data = sdegen.load("digits")
pixels = pixel_histogram(data.train, data.bins)
digits = PixelOracle(pixels.log_p.exp().numpy(), data.bins.centers(torch.float64).numpy())
some = data.test[: 20 if FAST else 100].double()
entropy = sdegen.bound(pixels, some).bits_per_dim
ends = (2, 4, 6, 8, 10, 12)
decoders = {"density decoder": GaussianDecoder(), "discrete decoder": SoftmaxDecoder(data.bins)}
by_end = {
    name: [
        sdegen.bound(sdegen.VPSDE(digits, sdegen.VP(LinearLogSNR(end, -8)), decoder=decoder), some, draws=16)
        for end in ends
    ]
    for name, decoder in decoders.items()
}
per_pixel = {
    "density decoder": [r.in_bits(r.nats) - math.log2(data.bins.width) for r in by_end["density decoder"]],
    "discrete decoder": [r.bits_per_dim for r in by_end["discrete decoder"]],
}
print(f"exact: {entropy:.3f} bits per pixel")
for name, values in per_pixel.items():
    print(f"{name:>16}:", ", ".join(f"{value:+.2f}" for value in values))
assert per_pixel["density decoder"][-1] < entropy - 0.5
assert abs(per_pixel["discrete decoder"][-1] - entropy) < 0.05

# %% tags=["hide-input"]
panel = Panel(
    {name: Series(ends, values) for name, values in per_pixel.items()},
    f"(d) Bits per pixel against the clean end of the path; exact {entropy:.2f}",
    "logsnr at the clean end",
    "bits per pixel",
    marks={"": entropy},
)
plots.lines([panel], size=(8, 3))

# %% [markdown]
# **(e) An error that no error bar sees.** The ODE's number carries its solver's error, which is not random: repeat it
# with a hundred seeds, and it is the same. The report measures it on some of the examples, by solving them again with a
# tenth of the tolerance; it is a size, and no bound:

# %%
for tol in (1e-2, 1e-3, 1e-4):
    report = sdegen.ode_likelihood(model, x, tol=tol)
    off = float((report.values - exact).square().mean().sqrt())
    print(f"tolerance {tol:.0e}: off by {off:.5f} nats; reported {report.solver_error:.5f}; kind: {report.kind}")

# %% [markdown]
# **(f) "The ODE is exact, so it must be below the bound."** Only if the score is a score. Multiply an exact one by
# $\kappa$: then the SDE with that drift is one model, the ODE another, and the bound is a bound of the *first*. On
# Gaussian data:

# %%
flat = sdegen.oracle("gaussian")


class Scaled:
    """The exact denoiser with its score multiplied by kappa."""

    event_shape = flat.event_shape

    def __init__(self, kappa):
        self.kappa = kappa

    def predict(self, path):
        return flat.predict(path, kappa=self.kappa)


g = flat.sample(30 if FAST else 100, seed=3)
kappas = (0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15)
models = {kappa: sdegen.VPSDE(Scaled(kappa), sdegen.VP(LinearLogSNR(12, -10))) for kappa in kappas}
sde = [sdegen.bound(models[kappa], g, draws=64).nats for kappa in kappas]
ode = [sdegen.ode_likelihood(models[kappa], g, tol=1e-4).nats for kappa in kappas]
best = -float(flat.log_prob(g).mean())
print(f"kappa = 0.9: bound {sde[1]:.3f}, ODE {ode[1]:.3f}; kappa = 1: {sde[3]:.3f}, {ode[3]:.3f}; exact {best:.3f}")
assert ode[1] > sde[1]
assert abs(ode[3] - best) < 0.01

# %% tags=["hide-input"]
panel = Panel(
    {"VP-SDE": Series(kappas, sde), "ODE": Series(kappas, ode)},
    f"(f) A wrong score: the bound and the ODE part; exact {best:.2f}",
    "factor κ on the score",
    "nats",
    look=MODELS,
    marks={"": best},
)
plots.lines([panel], size=(8, 3))

# %% [markdown]
# With the exact score the two agree. With a wrong one either may be the smaller, and the distance between them is a
# measure of how far the network is from being a score. `sdegen audit RUN` prints it for a trained model, with what
# every other setting moves.
#
# ## 6 · Where the bits are
#
# One pass over the noise levels shows where a model spends its nats, and how much of it a linear model would have
# known. The same pass gives the bound for *every* number of levels.

# %%
profile = denoising_profile(sdegen.VPSDE(truth, sdegen.VP(LinearLogSNR(8, -8))), x, bands=32)
print(f"{profile.report.nats:.2f} nats, of which half the area below is {float(profile.nats.sum()):.2f}")

# %% tags=["hide-input"]
likelihood_plots.denoising(profile.to_result())

# %% [markdown]
# ## What you know now
#
# - A likelihood is a **report**: bound or exact, probability or density, its cost, and two errors that are kept apart.
# - **Stratify, subtract what is known, compare on the same noise**: precision for nothing.
# - A number that is too good has a reason: noise in an exponent, a density in the place of a probability, a path that
#   ends too cleanly, a tolerance that was never checked.
# - Bound and ODE agree if, and only if, the network has learnt a score.
#
# On your own model: `sdegen likelihood RUN --methods "bound,bound(T=100),ode"`, and `sdegen audit RUN`.
