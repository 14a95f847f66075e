# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 5 · Your own data and network
#
# Your data are not digits, and your network is not ours. This notebook brings both: data from a file, a plain
# `nn.Module` that has never heard of diffusion, and then everything else that the library does: training, samples of a
# class that you ask for, likelihoods, and a file from which it all comes back.

# %% tags=["hide-input", "setup"]
import os
import tempfile
from pathlib import Path

import h5py
import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import silu

import sdegen
from sdegen import plots, style
from sdegen.models import pixel_histogram
from sdegen.plots import Panel, Series
from sdegen.runs import Run
from sdegen.style import INK, MODELS
from sdegen.train import load_weights
from solvers import DiffusionProblem, Prediction, prior, solve

style.notebook()
torch.set_num_threads(1)
torch.manual_seed(0)
FAST = bool(os.environ.get("SDEGEN_FAST"))  # the same in small
folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## 1 · Data
#
# Ours are *outlines*: 32 points around a closed curve with two to five lobes, of any size, stretch and rotation, drawn
# with a slightly unsteady hand. One row of 64 numbers for each, and the number of lobes as a label. They lie in an HDF5
# file, as yours might.


# %%
def outlines(n, rng):
    lobes = rng.integers(2, 6, n)
    angle = 2 * np.pi * np.arange(32) / 32 + rng.uniform(0, 2 * np.pi, (n, 1))
    depth, size = rng.uniform(0.25, 0.45, (n, 1)), rng.uniform(0.6, 1.2, (n, 1))
    radius = size * (1 + depth * np.cos(lobes[:, None] * angle + rng.uniform(0, 2 * np.pi, (n, 1))))
    x, y = radius * np.cos(angle), radius * np.sin(angle) * rng.uniform(0.8, 1.2, (n, 1))
    points = np.stack([x, y], -1) + 0.01 * rng.standard_normal((n, 32, 2))
    return points.reshape(n, 64).astype(np.float32), lobes


points, lobes = outlines(1000 if FAST else 6000, np.random.default_rng(0))
with h5py.File(folder / "outlines.h5", "w") as file:
    file["points"], file["lobes"] = points, lobes - 2  # labels count from 0

data = sdegen.from_file(folder / "outlines.h5", "points", labels="lobes")
print(data.describe())


# %% tags=["hide-input"]
def draw(groups, rows=3, columns=6):
    """Outlines in groups side by side; title -> (N, 64) in the file's units."""
    with style.style():
        figure = Figure((11, 11 / len(groups) / columns * rows * 1.05 + 0.35), layout="constrained")
        for part, (title, values) in zip(
            figure.subfigures(1, len(groups), squeeze=False)[0], groups.items(), strict=True
        ):
            axes = part.subplots()
            for i, outline in enumerate(np.asarray(values)[: rows * columns].reshape(-1, 32, 2)):
                at = 3.8 * np.array([i % columns, -(i // columns)])
                axes.fill(*(outline + at).T, facecolor="#dfe3ee", edgecolor=INK, lw=0.9)
            axes.set(aspect="equal", xlim=(-2, 3.8 * columns - 1.8), ylim=(1.8 - 3.8 * rows, 2), title=title)
            axes.axis("off")
    return figure


draw({f"{k} lobes": points[lobes == k] for k in (2, 3, 4, 5)}, columns=4)

# %% [markdown]
# Values that are not grey levels are real-valued: the set is shifted and scaled to zero mean and unit variance, and
# `data.raw` takes samples back. A tenth is held out. What is wrong with a file is said in one line before anything is
# trained on it:

# %%
for wrong in ({"key": "pionts"}, {"key": "lobes"}, {"key": "points", "levels": 256}):
    try:
        sdegen.from_file(folder / "outlines.h5", **wrong)
    except ValueError as error:
        print(error)

# %% [markdown]
# ## 2 · A network
#
# Any module will do that takes `(z, logsnr, cond)` and returns as many numbers as `z` has: `z` is the noisy datum,
# scaled to unit variance; `logsnr`, one number for each row, says how noisy; `cond` is a class for each row, −1 where
# none is given, or `None`. This one knows that its 64 numbers are points around a *closed* curve, and runs its
# convolutions around it.


# %%
class Around(nn.Module):
    def __init__(self, width=64, classes=4):
        super().__init__()
        features = nn.Linear(3, width), nn.SiLU(), nn.Linear(width, width)
        self.level, self.label = nn.Sequential(*features), nn.Embedding(1 + classes, width)
        self.first, self.last = nn.Conv1d(2, width, 1), nn.Conv1d(width, 2, 1)
        self.steer = nn.ModuleList(nn.Linear(width, width) for _ in range(5))
        self.turn = nn.ModuleList(
            nn.Conv1d(width, width, 5, padding=2 * d, dilation=d, padding_mode="circular") for d in (1, 2, 4, 2, 1)
        )

    def forward(self, z, logsnr, cond=None):
        h = self.first(z.reshape(-1, 32, 2).mT)
        label = torch.zeros(len(z), dtype=torch.long) if cond is None else cond + 1
        waves = torch.stack([logsnr / 10, (logsnr / 3).sin(), (logsnr / 3).cos()], 1)
        told = silu(self.level(waves) + self.label(label))
        for steer, turn in zip(self.steer, self.turn, strict=True):
            h = h + turn(silu(h + steer(told)[:, :, None]))
        return self.last(silu(h)).mT.reshape(z.shape)


def build():
    denoiser = sdegen.Denoiser(Around(), predicts="edm").calibrate(data.train)
    return sdegen.VPSDE(denoiser, objective=sdegen.OBJECTIVES["edm"], event_shape=data.event_shape)


# %% [markdown]
# `Denoiser` says what the answer of the network *means* (noise, datum, velocity; `"edm"` is what is left of the datum
# after the best linear guess, which suits real-valued data), and `calibrate` tells it mean and spread of the data.
# `VPSDE` makes it a model: a path, a bound, samplers. The *objective* says which noise levels matter in training:
# `"elbo"` is the bound itself and counts every bit, `"edm"` cares for shape more than for the unsteadiness of the hand.
# Then:

# %%
model = build()
settings = sdegen.TrainConfig(
    steps=40 if FAST else 2500,
    batch_size=128,
    lr=3e-3,
    conditional=True,
    drop_labels=0.1,
    eval_every=20 if FAST else 250,
)
run = Run.create(folder / "run", 'about = "outlines, with a network of our own"\n')
history = sdegen.fit(model, data, settings, run=run, progress=False).history
print("in the folder of the run:", ", ".join(sorted(path.name for path in run.path.glob("[!.]*"))))

# %% tags=["hide-input"]
steps = [row["step"] for row in history]
curve = Series(steps, [row["held_out"] for row in history])
panel = Panel(
    {"held out": curve},
    "The bound while training",
    "steps",
    "bits per number, of a density",
    look={"held out": MODELS["VP-SDE"]},
)
plots.lines([panel], size=(7.5, 2.8))

# %% [markdown]
# (The density of real-valued data may be larger than one, so its logarithm may have either sign.)
#
# ## 3 · Samples
#
# Any solver, any budget, and a class for each sample:

# %%
n = 24 if FAST else 200
asked = torch.arange(4).repeat_interleave(n)
drawn = data.raw(model.sample(4 * n, asked, seed=1, solver="dpmpp_2m", nfe=20))


def count_lobes(values):
    """The strongest wave of the radius, around the middle."""
    outline = np.asarray(values).reshape(-1, 32, 2)
    radius = np.linalg.norm(outline - outline.mean(1, keepdims=True), axis=-1)
    return np.abs(np.fft.rfft(radius, axis=1))[:, 2:6].argmax(1) + 2


right = count_lobes(drawn) == asked.numpy() + 2
print(f"{100 * right.mean():.0f} % of the samples have the number of lobes that was asked for")
print(f"(of the data, the count finds {100 * (count_lobes(points) == lobes).mean():.0f} %)")
assert FAST or right.mean() > 0.9

# %% tags=["hide-input"]
draw({f"{k + 2} lobes, please": drawn[asked == k] for k in range(4)}, columns=4)

# %% [markdown]
# And one noise, asked for each class in turn:

# %% tags=["hide-input"]
paths = {}
for k in (0, 2, 3):
    walk = model.solve(1, torch.tensor([k]), seed=4, solver="heun", steps=40, save="all")
    shown = [i for i in range(41) if i % 8 == 0]
    scale = torch.hypot(model.path.alpha(walk.ts), model.path.sigma(walk.ts))
    paths[f"from noise to {k + 2} lobes"] = data.raw((walk.xs[:, 0] / scale[:, None])[shown])
draw(paths, rows=1)

# %% [markdown]
# ## 4 · How likely?
#
# Held-out outlines, in nats. To have something to compare with: the best Gaussian, whose density is known.

# %%
few = slice(0, 30 if FAST else 300)
x, labels = data.test[few], data.test_cond[few]
flat = data.train.double()
gauss = sdegen.GaussianOracle(flat.mean(0).numpy(), torch.cov(flat.T).numpy())
by_gauss = -gauss.log_prob(x.double())
report = sdegen.bound(model, x, labels)
print(report)
print(f"a Gaussian: {by_gauss.mean():.1f} nats; better by {float(by_gauss.mean()) - report.nats:.1f}")
assert FAST or report.nats < float(by_gauss.mean())

# %% [markdown]
# A density has a unit: nats per outline *in model units*. `data.log_volume` takes it to the units of the file. And
# where a likelihood can be asked for each class, there is a classifier for free: the class under which an outline is
# most likely.

# %%
noises = {"draws": 8 if FAST else 32, "seed": 0}  # the same noises for every class: fair
costs = torch.stack([sdegen.bound(model, x, torch.full_like(labels, k), repeats=1, **noises).values for k in range(4)])
guess = costs.argmin(0)
print(f"in the units of the file: {report.nats - data.log_volume:.1f} nats")
print(f"classified by likelihood alone: {100 * float((guess == labels).double().mean()):.0f} % right")
assert FAST or float((guess == labels).double().mean()) > 0.9

# %% [markdown]
# ## 5 · Away and back
#
# The folder of the run holds the averaged weights as `model.safetensors`, which is safe to open. With the lines that
# built the model, it is the model again, to the last bit:

# %%
again = load_weights(run.verified("model.safetensors"), build()).eval()
assert torch.equal(again.sample(4, asked[:4], seed=1), model.sample(4, asked[:4], seed=1))
print(f"{sum(p.numel() for p in again.parameters()):,} parameters in {run.path.name}/model.safetensors; metrics:")
print((run.path / "metrics.csv").read_text().splitlines()[0])

# %% [markdown]
# `fit(..., run=run, resume=True)` goes on from there, or from the last half minute after a crash. With a network that
# the library knows, the command line does all of this:
#
# ```
# sdegen train runs/outlines --data outlines.h5 --data.key points --data.labels lobes --train.conditional true
# sdegen sample runs/outlines --n 64 --solver dpmpp_2m --nfe 20
# sdegen likelihood runs/outlines
# ```
#
# ## 6 · Images
#
# Arrays of bytes are images with 256 grey levels, and other integers are levels if you say how many. Then `"levels"` is
# the prediction to choose: for each pixel a distribution over its levels. Untrained, such a model is a histogram for
# each pixel, so training starts where the baseline is, and likelihoods are bits per pixel of the *discrete* data.

# %%
pictures = sdegen.from_arrays(load_digits().images.astype(np.uint8), levels=17)
print(pictures.describe())
net = sdegen.UNet(pictures.event_shape, outputs=pictures.bins.count, channels=(16, 32))
untrained = sdegen.VPSDE(sdegen.Denoiser(net, "levels", pictures.bins).calibrate(pictures.train))
start = sdegen.bound(untrained, pictures.test, draws=4 if FAST else 32)
histogram = sdegen.bound(pixel_histogram(pictures.train, pictures.bins), pictures.test)
print(f"untrained {start.bits_per_dim:.3f} ± {start.in_bits(start.estimator_se):.3f} bits per pixel,")
print(f"histogram {histogram.bits_per_dim:.3f}")
assert abs(start.bits_per_dim - histogram.bits_per_dim) < 4 * start.in_bits(start.estimator_se) + 0.02

# %% [markdown]
# ## 7 · A network from elsewhere
#
# You have a network already, trained with somebody else's code: it predicts the noise, and is told an integer step of a
# table of a thousand betas. Nothing needs to be wrapped. The table is a path, and a *function* is all that solvers ask
# for. (Here the exact answer for a mixture stands in for it.)

# %%
path = sdegen.Tabulated(betas=np.linspace(1e-4, 0.02, 1000))
mixture = sdegen.oracle("ring")


def foreign(z, step):
    """Somebody's eps-network: step is an integer from 1 to 1000."""
    return mixture.predict(path)(z, step / 1000).eps


def predict(z, t):
    eps = foreign(z, (1000 * t).round().clamp(1, 1000))
    return Prediction((z - path.sigma(t) * eps) / path.alpha(t), eps)


problem = DiffusionProblem(path, predict)
z = prior(path, (500, 2), seed=0, dtype=torch.float64)
whole = (1000 * torch.linspace(1, 0.03, 25, dtype=torch.float64) ** 2).round()  # steps that it was trained on
found = solve(problem, z, solver="dpmpp_2m", ts=whole / 1000)
print(found)
radius, truth = found.x.norm(dim=1), mixture.sample(500, seed=0).norm(dim=1)
print(f"mean radius of the samples {radius.mean():.3f}, of exact ones {truth.mean():.3f}")
assert abs(float(radius.mean() - truth.mean())) < 0.02

# %% [markdown]
# ## What you know now
#
# - Data: an array in a file, or in memory. Integers are levels, everything else is scaled and scaled back.
# - A network: `(z, logsnr, cond)` in, numbers of the shape of `z` out. `Denoiser` says what they mean.
# - Then `fit`, `sample`, `bound`, `save` and `load`, and every solver, with nothing more to write.
# - And if you have a network already, a function from $(z, t)$ to $(\hat x_0, \hat\epsilon)$ is enough.
