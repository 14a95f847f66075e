# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 1 · From autoencoder to VAE to DDPM to SDE
#
# Here are some digits. **Make more of them, and say how probable each one is.** That is all that a generative model
# has to do. This notebook goes from the simplest idea, squeeze an image through a narrow hole, to the one that paints
# today's pictures, in a few steps of which each mends what was wrong with the last.
#
# You need to know what a Gaussian is, what an expectation is, and how a network is trained. Nothing is claimed that is
# not checked on the spot: where the text says that two things are equal, an `assert` below it stops if they are not.

# %% tags=["hide-input", "setup"]
import math
import os
from itertools import pairwise

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.distributions import Normal, kl_divergence

import sdegen
from sdegen import plots, style
from sdegen.comparison import sliced_wasserstein
from sdegen.decoders import CategoricalHead
from sdegen.models import pixel_histogram, uniform
from sdegen.paths import Cosine, LinearBeta, LinearLogSNR
from sdegen.plane import Plane, field, planes, raster
from sdegen.plots import Panel, Series
from sdegen.style import COLORS, GREY, INK, MODELS, Look
from solvers import prior, solve

style.notebook()  # a figure that is the value of a cell is shown
torch.set_num_threads(1)
torch.manual_seed(0)
f64 = {"dtype": torch.float64}  # formulas are checked in double precision
FAST = bool(os.environ.get("SDEGEN_FAST"))  # the same in small, for a quick look or a test

# %% [markdown]
# ## 0 · What is wanted
#
# A *generative model* is a distribution $p(x)$ from which one can **draw**, and which one can **evaluate**. The second
# gives a score: the better a model knows digits, the less surprised it is by digits that it has never seen. The
# surprise is $-\log p(x)$, in nats; divided by the number of pixels and by $\log 2$ it is in *bits per pixel*, which is
# what a compressor built on the model would need. Less is better.
#
# Two yardsticks that know nothing about digits: all 17 grey levels alike, and each pixel with a histogram of its own.

# %%
data = sdegen.load("digits")
print(data.describe())

alike, pixels = uniform(data.event_shape, data.bins), pixel_histogram(data.train, data.bins)
bits = {name: sdegen.bound(model, data.test).bits_per_dim for name, model in {"alike": alike, "pixels": pixels}.items()}
assert abs(bits["alike"] - math.log2(17)) < 1e-9

# %% tags=["hide-input"]
plots.gallery(
    {
        "Digits, held out": data.test[:24],
        f"Pixel by pixel: {bits['pixels']:.2f} bits per pixel": pixels.sample(24, seed=1),
        f"All levels alike: {bits['alike']:.2f} bits per pixel": alike.sample(24, seed=1),
    }
)

# %% [markdown]
# To know where ink usually is saves 1.7 bits per pixel. What makes a digit a digit, that the pixels *agree with each
# other*, is still missing.
#
# ## 1 · An autoencoder
#
# Squeeze the 64 pixels through two numbers $z$, and ask for the image back. What survives must be what the pixels
# agree on.
#
# $$ x \;\longrightarrow\; z=\text{encoder}(x)\in\mathbb R^2 \;\longrightarrow\; \hat x=\text{decoder}(z),
#    \qquad \text{minimise } |x-\hat x|^2 $$


# %%
def perceptron(inputs, outputs, width=256):
    hidden = nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
    return nn.Sequential(*hidden, nn.Linear(width, outputs))


def batch(x, size=256):
    return x[torch.randint(len(x), (size,))]


def minimise(loss, parameters, steps, lr=3e-3):
    """Adam, with a learning rate that falls to zero."""
    optimizer = torch.optim.Adam(parameters, lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        schedule.step()


encoder, decoder = perceptron(64, 2), perceptron(2, 64)


def squared_error():
    x = batch(data.train).flatten(1)
    return (x - decoder(encoder(x))).square().mean()


minimise(squared_error, [*encoder.parameters(), *decoder.parameters()], steps=100 if FAST else 1500)

with torch.no_grad():
    codes = encoder(data.test.flatten(1))
    anywhere = codes.mean(0) + 1.5 * codes.std(0) * torch.randn(20, 2)  # somewhere around where codes lie
    back, invented = (decoder(z).reshape(-1, 8, 8) for z in (codes[:20], anywhere))


# %% tags=["hide-input"]
def numerals(axes, z, labels):
    """Each code as the digit that it stands for."""
    shades = list(COLORS.values())
    for (a, b), k in zip(z.tolist(), labels.tolist(), strict=True):
        axes.text(a, b, str(k), color=shades[k], size=6.5, ha="center", va="center")


with style.style():
    figure = Figure((11, 3.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 2])
planes([Plane("Where held-out digits are put")], reach=2.6, on=left)
numerals(left.axes[0], (codes - codes.mean(0)) / codes.std(0), data.test_cond)
plots.gallery({"Digits": data.test[:20], "through two numbers": back, "any two numbers": invented}, columns=4, on=right)
figure

# %% [markdown]
# Two numbers go a long way. But this is no generative model: **nothing says where to draw $z$**. Between and beyond
# the codes the decoder was never asked anything: some of what it says are digits. Nor is there a $p(x)$ to score.
#
# ## 2 · A VAE: give the codes a distribution
#
# Say first how digits come about, and look for the codes afterwards. Draw $z \sim p(z) = \mathcal N(0, I)$; draw the
# image from what the decoder says, $p(x \mid z)$. That *is* a distribution of images,
#
# $$ p(x) = \int p(x\mid z)\,p(z)\,dz , $$
#
# but the integral is out of reach: nearly all codes have nothing to do with a given $x$. Those that have are the
# *posterior* $p(z\mid x)$, which we do not know either. So let a second network guess it, $q(z\mid x)$: the *encoder*,
# which now answers with a distribution.
#
# How far apart two distributions are is measured by the **Kullback-Leibler divergence**
# $\mathrm{KL}(q\,\|\,p)=\mathbb E_q[\log q/p]$: never negative, and zero only if they are equal. For *any* $q$,
#
# $$ -\log p(x) \;=\; \underbrace{\mathbb E_{q}\left[-\log p(x\mid z)\right]}_{\text{reconstruction}}
#    \;+\; \underbrace{\mathrm{KL}\left(q(z\mid x)\,\|\,p(z)\right)}_{\text{prior}}
#    \;-\; \underbrace{\mathrm{KL}\left(q(z\mid x)\,\|\,p(z\mid x)\right)}_{\text{gap}\ \ge\ 0} . $$
#
# (Put $p(z \mid x) = p(x\mid z)\,p(z)/p(x)$ into the last term to see it.) So the first two terms are an **upper
# bound** on the surprise, and both can be computed. Its negative is the *evidence lower bound*, or ELBO. Make the
# bound small, and two things happen at once: the model gets better, and the encoder gets closer to the truth.
#
# The smallest example in which everything is known: $z$ and $x$ are single numbers, and
# $p(x\mid z)=\mathcal N(z, s^2)$.

# %%
x, s = torch.tensor(1.2, **f64), 0.5
p = Normal(0 * x, 1.0)  # p(z)
posterior = Normal(x / (1 + s**2), s / math.hypot(1, s))  # p(z | x)
surprise = -Normal(0 * x, math.hypot(1, s)).log_prob(x)  # -log p(x), because p(x) = N(0, 1 + s^2)


def bound(q):
    reconstruction = 0.5 * math.log(2 * math.pi * s**2) + ((x - q.mean) ** 2 + q.variance) / (2 * s**2)
    return reconstruction + kl_divergence(q, p)


means = torch.linspace(-0.5, 2.5, 121, **f64)
guesses = {std: Normal(means, std) for std in (0.2, float(posterior.stddev), 0.9)}
for q in guesses.values():
    assert torch.allclose(bound(q) - surprise, kl_divergence(q, posterior))  # the gap is what it is said to be
assert torch.isclose(bound(posterior), surprise)

# %% tags=["hide-input"]
curves = {f"width {std:.2f}": (means[bound(q) < 5], bound(q)[bound(q) < 5]) for std, q in guesses.items()}
plots.lines(
    [
        Panel(
            {name: Series(*curve) for name, curve in curves.items()},
            "The bound for guesses q of three widths, and the surprise that it bounds",
            "mean of q",
            "nats",
            marks={"surprise, −log p(x)": float(surprise)},
            ylim=(0.8, 5),
        )
    ],
    size=(8, 3.2),
)

# %% [markdown]
# Only one of the three curves touches the line, and in one place: where $q$ is the posterior.
#
# **The KL divergence of two Gaussians** needs no sampling. For each coordinate, from $\mathcal N(m,s^2)$ to
# $\mathcal N(0,1)$,
#
# $$ \mathrm{KL} \;=\; \tfrac12\left(m^2 + s^2 - 1 - \log s^2\right), $$
#
# half of the squared distance, and a penalty for every width but one. Draws from $q$ must agree:

# %%
m, std = 1.0, 0.4
closed = 0.5 * (m**2 + std**2 - 1 - math.log(std**2))
q = Normal(torch.tensor(m, **f64), std)
draws = q.sample((100_000,))
ratio = q.log_prob(draws) - p.log_prob(draws)
error = float(ratio.std()) / len(ratio) ** 0.5
print(f"closed form {closed:.4f} nats; 100 000 draws {float(ratio.mean()):.4f} ± {error:.4f}")
assert abs(float(ratio.mean()) - closed) < 4 * error

# %% tags=["hide-input"]
z, stds = torch.linspace(-3, 3, 241, **f64), torch.logspace(-1, 0.6, 80, **f64)
contribution = q.log_prob(z).exp() * (q.log_prob(z) - p.log_prob(z))
densities = {"p(z)": p.log_prob(z).exp(), "q(z | x)": q.log_prob(z).exp(), "q log (q/p)": contribution}
costs = {f"m = {m:g}": 0.5 * (m**2 + stds**2 - 1 - (stds**2).log()) for m in (0, 1, 2)}
plots.lines(
    [
        Panel(
            {name: Series(z, y) for name, y in densities.items()},
            f"The area under the dotted curve is {closed:.2f} nats",
            "z",
        ),
        Panel(
            {name: Series(stds, y) for name, y in costs.items()},
            "What it costs to differ from N(0, 1)",
            "width of q",
            "nats",
            log="x",
        ),
    ],
    size=(11, 3),
)

# %% [markdown]
# **The reparameterization trick.** To train the encoder, the gradient of $\mathbb E_q[\,f(z)\,]$ is needed with respect
# to the parameters *of $q$*, the distribution that we draw from. Draw the noise first, and move it afterwards:
#
# $$ z = m + s\,\epsilon, \qquad \epsilon\sim\mathcal N(0,1). $$
#
# Now $z$ is a function of $m$ and $s$ like any other, and we differentiate through it. The alternative, which works for
# any distribution, is to weight $f$ by $\nabla\log q$. Both are right on average; one of them is usable.

# %%
n = 20_000
m, std = torch.full((n,), 0.3, requires_grad=True, **f64), 0.4


def f(z):
    return -Normal(z, s).log_prob(x)  # the reconstruction


z = m + std * torch.randn(n, **f64)
(through,) = torch.autograd.grad(f(z).sum(), m)
z = z.detach()
(weighted,) = torch.autograd.grad((f(z) * Normal(m, std).log_prob(z)).sum(), m)

truth = float((0.3 - x) / s**2)
for name, g in {"through z": through, "weighted by ∇ log q": weighted}.items():
    error = float(g.std()) / n**0.5
    print(f"{name:>20}: {float(g.mean()):+.3f} ± {error:.3f}; truth {truth:+.3f}")
    assert abs(float(g.mean()) - truth) < 4 * error
print(f"the trick makes the variance of one draw {float(weighted.var() / through.var()):.0f} times smaller")

# %% tags=["hide-input"]
edges = torch.linspace(-20, 5, 101, **f64)
counts = {
    name: Series((edges[1:] + edges[:-1]) / 2, torch.histogram(g, edges, density=True).hist)
    for name, g in {"through z": through, "weighted by ∇ log q": weighted}.items()
}
figure = plots.lines(
    [Panel(counts, "The gradient from a single draw; the line is the truth", "gradient")], size=(8, 2.6)
)
figure.axes[0].axvline(truth, color=INK, lw=0.8, ls=(0, (2, 2)))
figure

# %% [markdown]
# Now for digits. The encoder gives a mean and a width for each code; the decoder gives 17 numbers for each pixel, which
# a softmax turns into probabilities of the grey levels; and the loss is the bound, in four lines.


# %%
def vae_bound(vae, x):
    q = vae.encode(x).bottom  # N(mean(x), std(x)^2)
    z = q.sample(torch.randn_like(q.mean))  # mean + std * eps
    reconstruction = -vae.decode(z).log_prob(x)
    return reconstruction + q.kl_to_normal(torch.tensor(0.0))  # ... from N(0, 1), whose log std is 0


def trained_vae(latent):
    head, start = CategoricalHead(data.bins), data.bins.log_histogram(data.train)
    vae = sdegen.VAE.mlp(data.event_shape, head, latent=latent, width=256, dropout=0.3, log_histogram=start)
    minimise(lambda: vae_bound(vae, batch(data.train)).mean(), vae.parameters(), steps=100 if FAST else 1500, lr=2e-3)
    return vae.eval()


flat, vae = trained_vae(latent=2), trained_vae(latent=16)

with torch.no_grad():
    ours = torch.stack([vae_bound(vae, data.test) for _ in range(32)]).mean()
report = sdegen.bound(vae, data.test, draws=32)
print(f"our four lines: {float(ours):.2f} nats per digit; the library: {report.nats:.2f} ± {report.estimator_se:.2f}")
assert abs(float(ours) - report.nats) < 8 * report.estimator_se

# %% tags=["hide-input"]
with torch.no_grad():
    codes = flat.encode(data.test).bottom.mean
    line = Normal(0.0, 1.0).icdf(torch.linspace(0.02, 0.98, 13))
    drawn = flat.decode(torch.stack(torch.meshgrid(line, line.flip(0), indexing="xy"), -1).reshape(-1, 2)).mean

with style.style():
    figure = Figure((11, 3.7), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 2])
planes([Plane("Codes of held-out digits")], reach=3.2, on=left)
numerals(left.axes[0], codes, data.test_cond)
samples = vae.sample(169, seed=1)
plots.gallery({"What the plane decodes to": drawn, "Draws, with 16 numbers in z": samples}, columns=13, on=right)
figure

# %% [markdown]
# The codes fill the plane without holes, and every $z$ decodes to something. This **is** a generative model, with a
# score and three terms: reconstruction, *latent* (zero here; remember the name), prior.

# %%
print(
    f"{report.bits_per_dim:.3f} bits per pixel:", {name: round(nats, 2) for name, nats in report.parts.items()}, "nats"
)

# %% [markdown]
# What keeps it from being good? All structure has to come out of *one jump* from noise to data, through a decoder that
# draws each pixel by itself, and the guess of the encoder must be a Gaussian. The digits come out rough.
#
# ## 3 · Many small steps
#
# The new idea: **do not learn the encoder at all.** Destroy the datum by adding noise, little by little, until nothing
# is left. Then each *step* of the way back is small, and small steps are easy.
#
# $$ q(z_t\mid x) = \mathcal N(\alpha_t x,\ \sigma_t^2 I), \qquad z_t = \alpha_t x + \sigma_t\,\epsilon ,\qquad
#    t\ \text{from } 0\ (\text{data}) \text{ to } 1\ (\text{noise}). $$
#
# Here $\alpha^2+\sigma^2=1$, which keeps the size of $z$: a *variance-preserving* path. What counts in the end is only
# the signal-to-noise ratio $\mathrm{SNR}=\alpha^2/\sigma^2$. It falls with $t$; its logarithm is called
# $\mathrm{logsnr}$.

# %%
path = sdegen.VP()
mixture = sdegen.oracle("mixture2d")  # data in the plane, of a density that is known exactly
points, eps = mixture.sample(250, seed=0), torch.randn(250, 2, **f64)
noisy = {t: path.alpha(t) * points + path.sigma(t) * eps for t in (path.t_min, 0.05, 0.13, 0.3, 1.0)}


# %% tags=["hide-input"]
def signed(number):
    return f"{float(number):+.1f}".replace("-", "−")


planes(
    [
        Plane(
            f"t = {t:g}" if t > path.t_min else "t = 0",
            raster(lambda z, t=t: mixture.log_prob_t(z, path, t).exp(), size=100),
            points=z,
            note=f"logsnr = {signed(path.logsnr(t))}",
        )
        for t, z in noisy.items()
    ]
)

# %% tags=["hide-input"]
frames = torch.linspace(path.t_min, 1, 12, **f64)
alpha, sigma = (c.reshape(-1, 1, 1).float() for c in (path.alpha(frames), path.sigma(frames)))
dissolving = torch.stack([alpha * x[0] + sigma * torch.randn(8, 8) for x in data.test[:3]])
shown = dissolving / (alpha + 1.5 * sigma)  # greys are scaled, so that noise is not cut off
plots.strips({"": shown}, [""] * 3, columns=[f"t = {t:.2f}" for t in frames.tolist()])

# %% [markdown]
# **Small steps or one jump?** A step from $s$ to a noisier $t$ is Gaussian, $z_t = \alpha_{t|s}\,z_s +
# \sigma_{t|s}\,\epsilon$. A thousand of them in a row must give exactly what the jump gives:

# %%
ts = torch.linspace(path.t_min, 1, 1001, **f64)
mean, variance = path.alpha(ts[0]), path.sigma(ts[0]) ** 2  # of z, for x = 1
for s, t in pairwise(ts):
    scale, std = path.transition(s, t)
    mean, variance = scale * mean, scale**2 * variance + std**2
print(f"1000 steps: mean {mean:.12f}, width {variance.sqrt():.12f}")
print(f"one jump:   mean {path.alpha(1.0):.12f}, width {path.sigma(1.0):.12f}")
assert torch.isclose(mean, path.alpha(1.0))
assert torch.isclose(variance.sqrt(), path.sigma(1.0))

# %% [markdown]
# **And back?** If we *knew* $x$, Bayes' rule would give the step back in closed form, because a product of Gaussians is
# a Gaussian. With $c = 1-\mathrm{SNR}_t/\mathrm{SNR}_s$,
#
# $$ q(z_s\mid z_t,x) \;=\; \frac{q(z_t\mid z_s)\,q(z_s\mid x)}{q(z_t\mid x)} \;=\;
#    \mathcal N\left(\tfrac{\alpha_s}{\alpha_t}(1-c)\,z_t + \alpha_s c\,x,\ \ \sigma_s^2\,c\right): $$
#
# a bit of where we are, a bit of where we want to go, and a little noise.

# %%
s, t = 0.25, 0.45
x, z_s, z_t = torch.randn(3, 1000, **f64)
scale, std = path.transition(s, t)
bayes = (
    Normal(scale * z_s, std).log_prob(z_t)
    + Normal(path.alpha(s) * x, path.sigma(s)).log_prob(z_s)
    - Normal(path.alpha(t) * x, path.sigma(t)).log_prob(z_t)
)
coef_z, coef_x, std = path.posterior(s, t)
assert torch.allclose(bayes, Normal(coef_z * z_t + coef_x * x, std).log_prob(z_s))

# %% [markdown]
# But we do not know $x$; it is what we want to make. Without it, $q(z_s\mid z_t)$ may look like anything: when $z_t$
# lies between two clusters, it has a hump for each. **Unless the step is small.** Then it is as good as a Gaussian,
# whatever the data:

# %%
two = sdegen.MixtureOracle([0.4, 0.6], [[-1.0], [0.8]], [[0.02], [0.03]])  # two clusters on a line
t, z_t = 0.45, torch.tensor(-0.05, **f64)
grid = torch.linspace(-2, 2, 2001, **f64)


def area(y):
    return torch.trapezoid(y, grid)


reverse = {}
for s in (0.05, 0.25, 0.35, 0.42):
    scale, std = path.transition(s, t)
    exact = (two.log_prob_t(grid[:, None], path, s) + Normal(scale * grid, std).log_prob(z_t)).exp()  # Bayes' rule
    exact = exact / area(exact)
    mean = area(grid * exact)
    gauss = Normal(mean, area((grid - mean) ** 2 * exact).sqrt())  # the Gaussian of the same mean and width
    kl = area(torch.xlogy(exact, exact) - exact * gauss.log_prob(grid))
    reverse[s] = exact, gauss, float(kl)
divergences = {s: kl for s, (*_, kl) in reverse.items()}
print("KL from the exact step to a Gaussian:", ", ".join(f"{kl:.6f} to s = {s}" for s, kl in divergences.items()))
assert list(divergences.values()) == sorted(divergences.values(), reverse=True)

# %% tags=["hide-input"]
panels = []
for s, (exact, gauss, _) in reverse.items():
    near = (grid - gauss.mean).abs() < 4.5 * gauss.stddev
    panels.append(
        Panel(
            {"exact": Series(grid[near], exact[near]), "gauss": Series(grid[near], gauss.log_prob(grid[near]).exp())},
            f"from t = {t:g} to s = {s:g}",
            "where it came from, z_s",
            look={"exact": Look(COLORS["indigo"], "", "-"), "gauss": Look(COLORS["rust"], "", (0, (4, 2)))},
            labels="",
        )
    )
figure = plots.lines(panels, size=(11, 2.6))
for axes in figure.axes:
    axes.set(yticks=[])
figure

# %% [markdown]
# (Line: exact; dashes: the Gaussian of the same mean and width.) So the model goes back in small Gaussian steps, and
# all that a step has to know is a mean. We take the form that Bayes' rule has, with **a guess $\hat x$ of the datum**
# in the place of the datum:
#
# $$ p(z_s\mid z_t) \;=\; q\left(z_s\mid z_t,\ x=\hat x(z_t)\right). $$
#
# ## 4 · The DDPM
#
# **What is the best guess?** The one of least squared error is the mean of all data that could have become $z_t$,
# $\hat x(z_t)=\mathbb E[x\mid z_t]$. Below are pairs $(z_t, x)$ from the two clusters, the mean of $x$ in each slice of
# $z_t$ (dots), and the formula (line). A network that is trained to remove noise learns this curve.

# %%
x = two.sample(40_000, seed=1)
slices = torch.linspace(-1.6, 1.6, 25, **f64)
pairs, averages = {}, {}
for t in (0.1, 0.3, 0.6):
    z = path.alpha(t) * x + path.sigma(t) * torch.randn_like(x)
    pairs[t], averages[t] = z, []
    for low, high in pairwise(slices):
        inside = (z[:, 0] > low) & (z[:, 0] < high)
        if (count := int(inside.sum())) > 100:
            mean, error = x[inside].mean(), x[inside].std() / count**0.5
            assert abs(mean - two.posterior_mean(z[inside], path, t).mean()) < 4.5 * error
            averages[t].append((float(low + high) / 2, float(mean)))

# %% tags=["hide-input"]
with style.style():
    figure = Figure((11, 2.9), layout="constrained")
    row = figure.subplots(1, 3, sharey=True)
    row[0].set_ylabel("x")
    for axes, t in zip(row, pairs, strict=True):
        axes.scatter(pairs[t][:1500], x[:1500], s=1.5, color=INK, alpha=0.25, linewidths=0)
        axes.plot(grid, two.posterior_mean(grid[:, None], path, t), color=COLORS["indigo"], lw=1.6)
        at, mean = zip(*averages[t], strict=True)
        axes.plot(at, mean, "o", color=COLORS["rust"], ms=4.5, markeredgecolor="white", markeredgewidth=0.5)
        axes.set(
            title=f"t = {t:g}, logsnr = {signed(path.logsnr(t))}", xlabel="z_t", xlim=(-1.7, 1.7), ylim=(-1.7, 1.7)
        )
figure

# %% [markdown]
# Little noise: believe what you see. Much noise: say the mean of everything. Between: decide for a cluster.
#
# **Guess the datum or the noise?** Whoever knows one knows the other, because $z=\alpha \hat x+\sigma\hat\epsilon$. So
# *epsilon-prediction* and *x-prediction* are one prediction in two units, and so are their errors:
# $|\epsilon-\hat\epsilon|^2 = \mathrm{SNR}\,|x-\hat x|^2$.

# %%
t = torch.tensor(0.4, **f64)
x, eps = mixture.sample(1000, seed=2), torch.randn(1000, 2, **f64)
z = path.alpha(t) * x + path.sigma(t) * eps
x_hat, eps_hat = mixture.predict(path)(z, t)  # exact for this mixture; elsewhere a network
assert torch.allclose(path.alpha(t) * x_hat + path.sigma(t) * eps_hat, z)
assert torch.allclose((eps - eps_hat).square(), path.logsnr(t).exp() * (x - x_hat).square())

# %% [markdown]
# **The bound** is that of the VAE, for a chain of latents $z_1 \to\dots\to z_0\to x$ in the place of one:
#
# $$ -\log p(x) \;\le\; \underbrace{\mathbb E[-\log p(x\mid z_0)]}_{\text{reconstruction}} \;+\;
#   \underbrace{\sum_{\text{steps}}
#       \mathbb E\,\mathrm{KL}\left(q(z_s\mid z_t,x)\,\|\,p(z_s\mid z_t)\right)}_{\text{latent}}
#   \;+\; \underbrace{\mathrm{KL}\left(q(z_1\mid x)\,\|\,\mathcal N(0,I)\right)}_{\text{prior}} . $$
#
# The middle term, which a VAE does not have, is now everything: at the clean end nothing is left to reconstruct, at the
# noisy end nothing to encode. Each of its steps compares two Gaussians of equal width, so it is a squared distance; and
# all coefficients collapse into **how much signal-to-noise ratio the step loses**:
#
# $$ \mathrm{KL} \;=\; \tfrac12\left(\mathrm{SNR}_s-\mathrm{SNR}_t\right)|x-\hat x(z_t)|^2. $$

# %%
s, t = 0.35, 0.4
coef_z, coef_x, std = path.posterior(s, t)
step, model = Normal(coef_z * z + coef_x * x, std), Normal(coef_z * z + coef_x * x_hat, std)
lost = path.logsnr(s).exp() - path.logsnr(t).exp()
assert torch.allclose(kl_divergence(step, model).sum(1), 0.5 * lost * (x - x_hat).square().sum(1))

# %% [markdown]
# **Training** is then hardly a page. Draw a datum, a time and a noise; mix; ask for the noise; square the error. (All
# times count alike: Ho's *simple* loss. The bound's own weights come in section 5.) And **sampling** walks the steps
# back.

# %%
cloud = mixture.sample(20_000, seed=3).float()
net = sdegen.MLP((2,), width=96, depth=3)  # net(z, logsnr) gives as many numbers as z has


def ddpm_loss():
    x = batch(cloud, 512)
    t = path.t_min + (1 - path.t_min) * torch.rand(512, 1)
    eps = torch.randn_like(x)
    z = path.alpha(t) * x + path.sigma(t) * eps
    return (eps - net(z, path.logsnr(t[:, 0]))).square().mean()


@torch.no_grad()
def ddpm_sample(n, T):
    z = torch.randn(n, 2)
    for t, s in pairwise(torch.linspace(1, path.t_min, T + 1)):
        eps_hat = net(z, path.logsnr(t).expand(n))
        x_hat = (z - path.sigma(t) * eps_hat) / path.alpha(t)  # guess the datum,
        coef_z, coef_x, std = path.posterior(s, t)  # and step as Bayes' rule says
        z = coef_z * z + coef_x * x_hat + std * torch.randn(n, 2)
    return z


minimise(ddpm_loss, net.parameters(), steps=150 if FAST else 2500, lr=2e-3)
clouds = {T: ddpm_sample(500 if FAST else 2000, T) for T in (5, 20, 200)}

# %% tags=["hide-input"]
shown = {"Data": mixture.sample(2000, seed=4)} | {f"T = {T} steps": z for T, z in clouds.items()}
planes([Plane(title, points=z) for title, z in shown.items()], reach=1.7)

# %% [markdown]
# Five steps are too few to be small; two hundred are not. Nothing but a regression was ever trained.
#
# **On digits** we do the same with a *U-Net*, a convolutional network that sees the image at two resolutions. It
# answers for each pixel with a distribution over the 17 grey levels, whose mean is $\hat x$: images are made of levels,
# and a network that need not learn to round has more time for digits.

# %%
unet = sdegen.UNet(data.event_shape, outputs=data.bins.count)
denoiser = sdegen.Denoiser(unet, "levels", data.bins).calibrate(data.train)
diffusion = sdegen.VPSDE(denoiser)
training = sdegen.TrainConfig(steps=12 if FAST else 500, batch_size=128, lr=4e-3, ema=0.98, eval_every=0)
history = sdegen.fit(diffusion, data, training, progress=False).history
ddpm = diffusion.discretize(T=50 if FAST else 250)  # the DDPM with so many levels, on the same weights
print(f"held-out digits: {history[-1]['held_out']:.2f} bits per pixel")

# %% tags=["hide-input"]
found = diffusion.solve(3, seed=5, solver="ancestral", steps=176, save="all")
ts, states = found.ts[::16], found.xs[::16]
with torch.no_grad():
    guessed = torch.stack([diffusion.predict()(z, t).x0 for z, t in zip(states, ts, strict=True)])
reach = (diffusion.path.alpha(ts) + 1.5 * diffusion.path.sigma(ts)).reshape(-1, 1, 1, 1, 1).float()
rows = torch.stack([states / reach, guessed]).permute(2, 0, 1, 3, 4, 5).flatten(0, 1)[:, :, 0]
columns = [signed(value) for value in diffusion.path.logsnr(ts)]
plots.strips({"": rows}, ["z_t", "guess of x"] * 3, columns=columns, breaks=(2, 4))

# %% [markdown]
# From left to right, noise becomes a digit (the numbers are $\mathrm{logsnr}$). Above, the state; below, what the
# network thinks it will become: first the mean of all digits, then a choice, then detail.

# %% tags=["hide-input"]
plots.gallery(
    {
        "Digits, held out": data.test[:36],
        "VAE, one jump": vae.sample(36, seed=2),
        f"DDPM, {ddpm.levels.T} small steps": ddpm.sample(36, seed=2),
    }
)

# %% [markdown]
# ## 5 · How many steps? The continuous limit
#
# Write the latent term once more, with everything put in. Let $\mathrm{mmse}=\mathbb E|x-\hat x|^2$ be the error that
# is left at a noise level. Then
#
# $$ \text{latent} \;=\;
#    \tfrac12\sum_{\text{steps}} \left(\mathrm{SNR}_s-\mathrm{SNR}_t\right)\mathrm{mmse}(\mathrm{SNR}_t)
#    \;\;\longrightarrow\;\; \tfrac12\int \mathrm{mmse}\; d\,\mathrm{SNR}
#    \;=\; \tfrac12\int \mathbb E|\epsilon-\hat\epsilon|^2\; d\,\mathrm{logsnr}. $$
#
# The sum is a staircase over a falling curve: it lies **above** the curve, each finer staircase is **lower**, and the
# excess falls like $1/T$. In the limit the time $t$ has disappeared: *only the two ends of the path matter.*

# %%
x, eps = mixture.sample(2000, seed=5), torch.randn(2000, 2, **f64)
ends = [float(path.logsnr(t)) for t in (1.0, path.t_min)]  # logsnr of the noise and of the data


def noise_error(logsnr):
    """E|eps - eps_hat|^2 at each noise level, with the exact denoiser."""
    found = []
    for t in path.time(logsnr):
        z = path.alpha(t) * x + path.sigma(t) * eps
        found.append((eps - mixture.predict(path)(z, t).eps).square().sum(1).mean())
    return torch.stack(found)


fine = torch.linspace(*ends, 385, **f64)
curve = noise_error(fine)
latent = {"∞": 0.5 * float(torch.trapezoid(curve, fine))}
for T in (48, 24, 12):
    nodes = torch.linspace(*ends, T + 1, **f64)
    latent[T] = 0.5 * float((torch.expm1(nodes.diff()) * noise_error(nodes[:-1])).sum())
print("latent term in nats:", ", ".join(f"T = {T}: {nats:.2f}" for T, nats in latent.items()))
assert list(latent.values()) == sorted(latent.values())

# %% tags=["hide-input"]
stairs = {}
for T in (12, 24, 48):
    nodes = torch.linspace(*ends, T + 1, **f64)
    below = torch.searchsorted(nodes, fine).clamp(1, T) - 1  # the noisy end of the step that a level lies in
    stairs[f"T = {T}"] = Series(fine, (fine - nodes[below]).exp() * noise_error(nodes[:-1])[below])
colors = {"T = 12": Look(COLORS["ochre"], "", "-"), "T = 24": Look(COLORS["teal"], "", (0, (4, 1.4)))}
figure = plots.lines(
    [
        Panel(
            stairs | {"T = ∞": Series(fine, curve)},
            "Half of the area under each curve is its latent term",
            "logsnr (noise at the left, data at the right)",
            "squared error of the noise",
            look={**colors, "T = 48": Look(COLORS["steel"], "", "-"), "T = ∞": Look(INK, "", "-")},
        )
    ],
    size=(9, 3.4),
)
figure.axes[0].fill_between(fine, 0 * fine, curve, color=INK, alpha=0.12, lw=0)
figure

# %% [markdown]
# (Over $\mathrm{logsnr}$ a stair, one value of mmse for the whole step, is drawn as $\mathrm{SNR}\cdot\mathrm{mmse}$: a
# tooth.) Now the whole bound, against the truth, which for this mixture is known:

# %%
continuous = sdegen.VPSDE(mixture, path)  # the exact denoiser in the place of a network
test = mixture.sample(300 if FAST else 2000, seed=6)
settings = {"draws": 16 if FAST else 64, "seed": 0}  # the same noises for all: differences are known well
Ts = (16, 32, 64, 128, 256, 512)
limit = sdegen.bound(continuous, test, **settings)
bounds = [sdegen.bound(continuous.discretize(T, grid="logsnr"), test, **settings) for T in Ts]

exact = -mixture.log_prob(test)
excess = [float((found.values - limit.values).mean()) for found in bounds]
print(f"exact surprise {exact.mean():.3f} nats; bound for T = ∞ {limit.nats:.3f} ± {limit.estimator_se:.3f}")
print("T times the excess:", ", ".join(f"{T * nats:.1f}" for T, nats in zip(Ts, excess, strict=True)))
assert abs(limit.nats - float(exact.mean())) < 4 * limit.estimator_se + 0.02  # what the two ends of the path leave
assert abs(math.log2(excess[-2] / excess[-1]) - 1) < 0.1  # twice the levels, half the excess

# %% tags=["hide-input"]
exactly = Series(Ts, [float(exact.mean())] * len(Ts))
dashed = Look(GREY, "", (0, (2, 2)))
falling = Series(Ts, [excess[-1] * Ts[-1] / T for T in Ts])
common = {"xlabel": "number of levels T", "ticks": (Ts, ())}
plots.lines(
    [
        Panel(
            {"DDPM": Series(Ts, [found.nats for found in bounds]), "exact": exactly},
            "The bound falls to the truth",
            ylabel="nats per point",
            log="x",
            look={**MODELS, "exact": dashed},
            **common,
        ),
        Panel(
            {"DDPM": Series(Ts, excess), "1 / T": falling},
            "at the rate 1 / T",
            ylabel="nats above T = ∞",
            log="xy",
            look={**MODELS, "1 / T": dashed},
            **common,
        ),
    ],
    size=(11, 3.2),
)

# %% [markdown]
# And the clock? Three schedules, three speeds through the same noise levels, one integral:

# %%
clocks = {"linear logsnr": LinearLogSNR(ends[1], ends[0]), "linear beta": LinearBeta(), "cosine": Cosine()}
levels, gathered = {}, {}
for name, clock in clocks.items():
    noise, clean = clock.time(torch.tensor(ends, **f64))
    t = torch.lerp(noise, clean, torch.linspace(0, 1, 4001, **f64).sqrt()).clamp(1e-9, 1 - 1e-9)
    error = torch.as_tensor(np.interp(clock.logsnr(t), fine, curve))
    levels[name] = Series(t, clock.logsnr(t))
    gathered[name] = Series(t[1:], 0.5 * torch.cumulative_trapezoid(clock.dlogsnr(t) * error, t))
totals = [float(series.y[-1]) for series in gathered.values()]
print("latent terms:", ", ".join(f"{name} {nats:.3f}" for name, nats in zip(gathered, totals, strict=True)), "nats")
assert max(totals) - min(totals) < 0.02

# %% tags=["hide-input"]
figure = plots.lines(
    [
        Panel(levels, "Three clocks ...", "time t", "logsnr", labels=""),
        Panel(gathered, "... one total: nats gathered on the way from noise to data", "time t", "nats"),
    ],
    size=(11, 3.2),
)
for axes in figure.axes:
    axes.invert_xaxis()
figure

# %% [markdown]
# ## 6 · Score and SDE
#
# With infinitely many steps the noising becomes a *stochastic differential equation*: in a time $dt$, shrink a little
# and add a little noise, $dW\sim\mathcal N(0, dt)$.
#
# $$ dz = f(t)\,z\,dt + g(t)\,dW, \qquad f=\frac{d\log\alpha}{dt},\qquad
#    g^2=-\sigma^2\,\frac{d\,\mathrm{logsnr}}{dt}. $$
#
# Euler's method for it must give the mean $\alpha$ and the width $\sigma$, the better the shorter its steps:

# %%
for N in (10, 100, 1000):
    ts = torch.linspace(path.t_min, 0.5, N + 1, **f64)
    mean, variance = path.alpha(ts[0]), path.sigma(ts[0]) ** 2  # of z, for x = 1
    for s, t in pairwise(ts):
        shrink = 1 + (t - s) * path.f(s)
        mean, variance = shrink * mean, shrink**2 * variance + (t - s) * path.g2(s)
    errors = mean / path.alpha(0.5) - 1, variance.sqrt() / path.sigma(0.5) - 1
    print(f"{N:5} steps to t = 0.5: alpha is off by {100 * errors[0]:+.2f} %, sigma by {100 * errors[1]:+.3f} %")
assert max(abs(error) for error in errors) < 0.005

# %% [markdown]
# To turn time around one has to know which way the data are. That is the **score**, the direction in which the density
# grows, and *the denoiser is the score*:
#
# $$ \nabla_z\log q(z_t) \;=\; -\,\frac{\hat\epsilon(z_t)}{\sigma_t}. $$
#
# (Tweedie's formula.) **To remove noise is to walk uphill.** Left, by automatic differentiation of the exact density;
# right, by the exact posterior mean:

# %%
z = (2 * torch.randn(500, 2, **f64)).requires_grad_()
for t in torch.tensor([0.05, 0.3, 0.8], **f64):
    (gradient,) = torch.autograd.grad(mixture.log_prob_t(z, path, t).sum(), z)
    assert torch.allclose(gradient, -mixture.predict(path)(z, t).eps / path.sigma(t))

# %% tags=["hide-input"]
t = torch.tensor(0.06)
shades = {t: raster(lambda z, t=t: mixture.log_prob_t(z, path, t).exp(), size=100, reach=2.2) for t in (0.2, 0.06)}
exact_score = {t: field(lambda z, t=t: mixture.score(z, path, t), reach=2.0) for t in shades}
learnt_score = field(lambda z: -net(z.float(), path.logsnr(t).expand(len(z))) / path.sigma(t), reach=2.0)
planes(
    [
        *(Plane(f"The score, t = {t:g}", shade, exact_score[t]) for t, shade in shades.items()),
        Plane("The network of section 4, t = 0.06", shades[0.06], learnt_score),
    ],
    reach=2.2,
)

# %% [markdown]
# The network was asked to remove noise, and nothing else; it has learnt the field of arrows wherever there are data.
#
# With the score there is a whole *family* of equations that run from noise to data, one for each amount of noise
# $\eta$, and all of them pass through the same densities $q(z_t)$:
#
# $$ dz \;=\; \left[f z - \tfrac{1+\eta^2}{2}\,g^2\,\nabla\log q(z_t)\right]dt + \eta\, g\, dW,
#    \qquad t \text{ from } 1 \text{ to } 0. $$
#
# $\eta=1$ is the **reverse SDE**, and $\eta=0$ the **probability-flow ODE**, which has no noise at all. On a line
# everything can be seen at once: the density in shades, paths on top.

# %%
problem = two.problem(path)  # a path and a denoiser: all that a solver needs
ts = torch.linspace(path.t_min, 1, 151 if FAST else 601, **f64)
walk = [path.alpha(ts[0]) * two.sample(7, seed=3)]
for s, t in pairwise(ts):
    scale, std = path.transition(s, t)
    walk.append(scale * walk[-1] + std * torch.randn(7, 1, **f64))
noise = torch.linspace(-1.8, 1.8, 7, **f64)[:, None]
reverse = solve(problem, noise, solver="euler_maruyama", ts=ts.flip(0), seed=1, save="all").xs
flow = solve(problem, noise, solver="heun", ts=ts.flip(0), save="all").xs

# %% tags=["hide-input"]
states, shown = torch.linspace(-2.6, 2.6, 300, **f64), torch.linspace(path.t_min, 1, 200, **f64)
density = torch.stack([two.log_prob_t(states[:, None], path, t).exp() for t in shown], 1)
panels = {
    "Forward SDE: from data to noise": (ts, torch.stack(walk)),
    "Reverse SDE: from noise to data": (ts.flip(0), reverse),
    "Probability-flow ODE: from noise to data": (ts.flip(0), flow),
}
with style.style():
    figure = Figure((11, 3.4), layout="constrained")
    for axes, (title, (when, lines)) in zip(figure.subplots(1, 3, sharey=True), panels.items(), strict=True):
        extent = (0, 1, -2.6, 2.6)
        cloud = (density / density.max(0).values).sqrt()
        axes.imshow(cloud, origin="lower", extent=extent, aspect="auto", cmap=style.CLOUD, vmin=0, vmax=1.15)
        axes.plot(when, lines[:, :, 0], color=INK, lw=0.6)
        axes.set(title=title, xlabel="time t", xlim=(0, 1), ylim=(-2.6, 2.6))
        axes.grid(visible=False)
figure

# %% [markdown]
# The same densities, from very different paths. In the plane, with a number: how far samples are from data (sliced
# Wasserstein distance), beside how far two sets of exact samples are from each other.

# %%
n = 500 if FAST else 4000
problem = mixture.problem(path)
z_1 = prior(path, (n, 2), seed=0, **f64)  # noise


def fresh(*_):
    return torch.randn(n, 2, **f64)  # noise for a step of the SDE


ends_at = {
    "SDE": solve(problem, z_1, solver="euler_maruyama", steps=150 if FAST else 500, noise=fresh).x,
    "ODE": solve(problem, z_1, solver="heun", steps=50).x,
}
target, another = (mixture.sample(n, seed=seed) for seed in (10, 11))
floor = sliced_wasserstein(target, another)
distance = {name: sliced_wasserstein(z, target) for name, z in ends_at.items()}
print(f"two exact samples {floor:.3f};", ", ".join(f"{name} and data {value:.3f}" for name, value in distance.items()))
assert max(distance.values()) < 3 * floor

# %% tags=["hide-input"]
density = raster(lambda z: mixture.log_prob_t(z, path, path.t_min).exp(), reach=2.2)
walks = solve(problem, z_1[:2], solver="ancestral", steps=150, grid="logsnr", seed=0, save="all").xs
lines = solve(problem, z_1[:40], solver="heun", steps=60, save="all").xs
planes(
    [
        Plane("Two paths of the SDE", density, paths=walks),
        Plane("Forty paths of the ODE", density, paths=lines),
        Plane("Where the SDE ends", points=ends_at["SDE"][:1500]),
        Plane("Where the ODE ends", points=ends_at["ODE"][:1500]),
    ],
    reach=2.2,
)

# %% [markdown]
# **The DDPM was there all the time.** Its sampler, and Euler's method for the reverse SDE, fed with the same Brownian
# motion $W$, become the same path as the steps get short:

# %%
apart = []
for N in (50, 100, 200):
    methods = ("ancestral", "euler_maruyama")
    one, other = (solve(problem, z_1[:32], solver=name, steps=N, grid="uniform", seed=0).x for name in methods)
    apart.append(float((one - other).square().mean().sqrt()))
print("apart after 50, 100 and 200 steps:", ", ".join(f"{value:.4f}" for value in apart))
assert apart[-1] < apart[0] / 2.5

# %% [markdown]
# **And the ODE knows what the VAE only bounds.** It carries every point to one noise and back, and so it carries the
# density along: $\log p(z_0)=\log p(z_1)+\int \mathrm{div}\,dt$.

# %%
x = mixture.sample(4, seed=9)
by_flow, exact = sdegen.ode_log_prob(continuous, x, tol=1e-6).log_prob, mixture.log_prob(x)
print("log p by the flow:", ", ".join(f"{value:+.3f}" for value in by_flow))
print("exact:            ", ", ".join(f"{value:+.3f}" for value in exact))
assert torch.allclose(by_flow, exact, atol=0.02)

# %% [markdown]
# ## 7 · One frame
#
# Three models, one bound: $-\log p(x)\;\le\;$ reconstruction + latent + prior, with
#
# $$ \text{latent} \;=\; \tfrac12\,\mathbb E\int |\epsilon-\hat\epsilon(z_t)|^2\,dm . $$
#
# They differ in **one thing**, the measure $m$ on noise levels:
#
# | model | measure $m$ | what is learnt |
# |---|---|---|
# | VAE | $0$: nothing lies between $z$ and $x$ | encoder and decoder |
# | DDPM | $T$ atoms of mass $\mathrm{SNR}_s/\mathrm{SNR}_t-1$ | the denoiser |
# | VP-SDE | $d\,\mathrm{logsnr}$, every level | the denoiser |
#
# So one set of weights is a DDPM with any number of levels, and a VP-SDE:

# %%
few, draws = data.test[: 60 if FAST else 360], 4 if FAST else 8
scored = {
    "VAE": sdegen.bound(vae, few, draws=32),
    **{f"DDPM, T = {T}": sdegen.bound(diffusion.discretize(T), few, draws=draws) for T in (10, 30, 100)},
    "VP-SDE": sdegen.bound(diffusion, few, draws=draws),
}
print(scored["VP-SDE"])

# %% tags=["hide-input"]
terms = {"reconstruction": (COLORS["ochre"], "///"), "latent": (COLORS["indigo"], ""), "prior": (COLORS["rose"], "...")}
with style.style():
    figure = Figure((9.5, 2.9), layout="constrained")
    axes = figure.subplots()
    left = torch.zeros(len(scored))
    for term, (color, hatch) in terms.items():
        width = torch.tensor([found.in_bits(found.parts[term]) for found in scored.values()])
        axes.barh(list(scored), width, left=left, color=color, hatch=hatch, edgecolor="white", height=0.62, label=term)
        left = left + width
    for y, found in enumerate(scored.values()):
        error = f" ± {found.in_bits(found.data_se):.3f}" if found.data_se > 0 else ""
        axes.text(found.bits_per_dim + 0.03, y, f"{found.bits_per_dim:.3f}{error}", va="center", size=8.5)
    axes.axvline(bits["pixels"], color=GREY, lw=0.8, ls=(0, (2, 2)))
    axes.text(bits["pixels"], -0.62, " each pixel by itself", color=GREY, size=8, va="bottom")
    axes.set(
        xlabel="bits per pixel of a held-out digit", ylim=(len(scored) - 0.5, -0.9), title="One bound, three terms"
    )
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.grid(visible=False, axis="y")
    axes.legend(loc="upper right", ncols=3, bbox_to_anchor=(1, 1.14))
figure

# %% [markdown]
# ## What you know now
#
# - An **autoencoder** finds codes. A **VAE** gives them a distribution, and a **bound** of three terms trains both of
#   its halves at once.
# - Put noise in the place of the learnt encoder, and many small steps in that of one jump: the **DDPM**. All it learns
#   is to remove noise, and each step costs half the SNR that it loses times the error that is left.
# - Let the steps become infinitely small. The sum becomes an integral that depends on its two ends only, the denoiser
#   becomes the **score**, and sampling becomes solving an **SDE** or an **ODE**, with any solver you like.
#
# Which solver, and with how many steps? [Notebook 2](02_solvers.ipynb). How sure is a likelihood?
# [Notebook 3](03_likelihood.ipynb).
