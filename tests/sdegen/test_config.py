"""Configurations: from signatures, through a file, over the command line; every mistake is one line with its key."""

from __future__ import annotations

import dataclasses
import inspect
import tomllib
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from sdegen.building import build
from sdegen.config import Choice, RunConfig, UsageError, configure, read_toml
from sdegen.networks import UNet
from sdegen.train import TrainConfig


def config(*words: str, **table: object) -> RunConfig:
    return configure(words, table)[0]


def test_defaults_are_those_of_the_signatures() -> None:
    made = config()
    assert (made.data.name, made.model.name, made.network and made.network.name) == ("digits", "vpsde", "unet")
    defaults = {name: p.default for name, p in inspect.signature(UNet).parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert made.network is not None
    assert dict(made.network.options) == {k: v for k, v in defaults.items() if k != "classes"}
    assert made.train == TrainConfig(seconds=60.0)
    assert type(made.threads) is int


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--model", "vae", "--model.latent=3", "--train.steps", "7"],
        ["--model=ddpm", "--model.T=10", "--network=mlp", "--network.width", "16", "--seed", "3"],
        ["--data", "moons", "--model.path", "flow", "--train.betas", "0.5,0.9", "--device=cpu", "--threads=1"],
        ["--network.channels", "8,16", "--network.attention", "[0]", "--train.conditional", "true"],
        ["--data", "some/where.npz", "--data.key", "x", "--data.levels", "256"],
    ],
)
@pytest.mark.parametrize("explained", [False, True])
def test_round_trip_through_toml(words: list[str], explained: bool) -> None:
    made = config(*words)
    text = made.to_toml(explained=explained)
    assert RunConfig.from_toml(text) == made
    assert RunConfig.from_toml(text).to_toml(explained=explained) == text
    assert tomllib.loads(text)["model"]["name"] == made.model.name


def test_every_key_is_explained() -> None:
    lines = [line for line in config().to_toml(explained=True).splitlines() if line and not line.startswith("[")]
    assert all("# " in line.lstrip("# ") for line in lines)
    keys = {line.lstrip("# ").split(" =")[0] for line in lines}
    assert {f.name for f in dataclasses.fields(TrainConfig)} <= keys


def test_the_command_line_goes_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('seed = 4\n[network]\nname = "unet"\nchannels = [8]\ndropout = 0.5\n[train]\nsteps = 3\n')
    made = config("--network.dropout=0.25", **read_toml(file))
    assert made.network is not None
    assert (made.seed, made.network.options["channels"], made.network.options["dropout"]) == (4, (8,), 0.25)
    assert (made.train.steps, made.train.seconds, made.train.seed) == (3, None, 4)
    other = config("--network", "mlp", **read_toml(file))  # the file's options are those of a U-Net
    assert other.network is not None
    assert other.network.options["dropout"] == 0.0


def test_vectors_get_a_perceptron() -> None:
    assert (made := config("--data", "moons").network) is not None
    assert made.name == "mlp"


@pytest.mark.parametrize("suffix", [".h5", ".npz", ".npy"])
def test_files_of_vectors_get_a_perceptron_and_files_of_images_do_not(suffix: str, tmp_path: Path) -> None:
    for name, shape, network in (("vectors", (20, 3), "mlp"), ("images", (20, 4, 4), "unet")):
        x, file = np.arange(np.prod(shape), dtype=float).reshape(shape), tmp_path / f"{name}{suffix}"
        if suffix == ".h5":
            with h5py.File(file, "w") as made:
                made["x"], made["labels"] = x, np.zeros(20, int)
        elif suffix == ".npz":
            np.savez(file, x=x, labels=np.zeros(20, int))
        else:
            np.save(file, x)
        key = [] if suffix == ".npy" else ["--data.key=x"]
        asked = config("--data", str(file), *key)
        assert asked.network is not None
        assert asked.network.name == network
        assert build(asked)[0].event_shape == ((3,) if name == "vectors" else (1, 4, 4))
        said = {"data": {"name": str(file), **({"key": "x"} if key else {})}}
        assert config(**said).network == asked.network
        assert config("--network=unet", **said).network.name == "unet"  # type: ignore[union-attr]
    assert config("--data", str(tmp_path / "gone.h5")).network.name == "unet"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("words", "table", "message"),
    [
        ([], {"network": {"chanels": [8]}}, r"unknown key network\.chanels; did you mean network\.channels"),
        ([], {"sed": 1}, r"unknown key sed; did you mean seed"),
        ([], {"train": 3}, r"unknown key train; did you mean train\."),
        ([], {"network": 3}, r'network is a table such as \[network\] with name = "unet"'),
        ([], {"model": {"name": "vae"}, "network": {"width": 3}}, r"a vae has networks of its own and no \[network\]"),
        ([], {"model": {"name": "vpsd"}}, r"model: there is no 'vpsd'; did you mean vpsde\?"),
        ([], {"data": {"name": "digit"}}, r"data: there is no 'digit'; did you mean digits"),
        ([], {"train": {"lr": "fast"}}, r"train\.lr: expected a number, not fast"),
        ([], {"train": {"steps": 2.5}}, r"train\.steps: expected a whole number or null, not 2\.5"),
        ([], {"network": {"channels": 8}}, r"network\.channels: expected a list such as \[8,16\], not 8"),
        ([], {"train": {"conditional": "perhaps"}}, r"train\.conditional: expected true or false, not perhaps"),
        (["--seed=-1"], {}, r"seed: expected a whole number ≥0, not -1"),
        (["--threads", "0"], {}, r"threads: expected a whole number >0, not 0"),
        (["--train.steps=-5"], {}, r"train\.steps must be positive, not -5"),
        (["--train.steps=nan"], {}, r"train\.steps: expected a whole number or null, not nan"),
        (["--train.lr=nan"], {}, r"train\.lr"),
        (
            ["--model", "ddpm", "--model.variance", "gamma"],
            {},
            r"model\.variance: expected posterior or beta, not gamma",
        ),
        (["--netwrk.width", "3"], {}, r"unknown option --netwrk\.width; did you mean --network\.width|--network"),
        (["--model.T", "3"], {}, r"unknown option --model\.T; "),
        (["--train.lr"], {}, r"--train\.lr: expected one argument"),
    ],
)
def test_mistakes(words: list[str], table: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        configure(words, table)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.path", "vp-cosin"], r"unknown path 'vp-cosin'; did you mean 'vp-cosine'"),
        (["--model.objective", "sinple"], r"unknown objective 'sinple'; did you mean 'simple'"),
        (["--model.predicts", "noise"], r"unknown prediction 'noise'"),
        (["--model", "ddpm", "--model.T=0"], r"T must be at least 1, not 0"),
        (["--network", "mlp", "--network.width=-4"], r"width must be at least 1, not -4"),
        (["--data", "moons", "--network", "unet"], r"a U-Net needs images"),
        (["--data", "moons", "--model.decoder", "softmax"], r"softmax is for grey levels"),
        (["--data", "nowhere.npz"], r"there is no file nowhere\.npz"),
        (["--device", "gpu"], r"device: 'gpu' cannot be used here"),
    ],
)
def test_mistakes_that_building_finds(words: list[str], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        build(config(*words))
    assert "\n" not in str(caught.value)


def test_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no file .*run\.toml"):
        read_toml(tmp_path / "run.toml")
    (tmp_path / "run.toml").write_bytes(b"PK\x03\xff")
    with pytest.raises(UsageError, match=r"run\.toml is not TOML"):
        read_toml(tmp_path / "run.toml")
    (tmp_path / "run.toml").write_text("seed = = 3")
    with pytest.raises(UsageError, match=r"run\.toml is not TOML: .*line 1"):
        read_toml(tmp_path / "run.toml")


def test_build_is_seeded_and_leaves_the_global_state_alone() -> None:
    words = ("--network", "mlp", "--network.width", "8", "--network.depth", "1")
    before = torch.get_rng_state()
    weights = [
        torch.cat([p.flatten() for p in build(config(*words, f"--seed={s}"))[1].parameters()]) for s in (0, 0, 1)
    ]
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_conditional_models_take_labels() -> None:
    words = ("--network", "mlp", "--network.width", "8", "--network.depth", "1", "--train.conditional", "true")
    data, model = build(config(*words))
    assert data.test_cond is not None
    assert model.loss(data.test[:4], data.test_cond[:4]).ndim == 0


def test_differences() -> None:
    begun = config("--train.steps", "10")
    assert config("--train.steps", "20", "--threads", "1", "--train.eval_every=5").differences(begun) == []
    assert config("--train.steps", "10", "--train.lr=1").differences(begun) == ["train.lr was 0.002, is 1.0"]
    assert config("--train.steps", "10", "--network=mlp").differences(begun) == ["network.name was unet, is mlp"]
    assert config("--train.steps", "10", "--seed=1").differences(begun) == ["seed was 0, is 1"]


def test_a_network_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "from torch import nn\n"
        "class Own(nn.Linear):\n"
        "    def __init__(self, event_shape: tuple[int, ...], outputs: int = 1, classes: int = 0, scale: float = 1):\n"
        "        super().__init__(2, 2 * outputs)\n"
        "        self.event_shape, self.scale = event_shape, scale\n"
        "    def forward(self, z, logsnr, cond=None):\n"
        "        return self.scale * super().forward(z)\n"
    )
    name = f"{tmp_path / 'own.py'}:Own"
    config, _ = configure(["--data", "moons", "--network", name, "--network.scale", "2"])
    assert config.network == Choice(name, {"scale": 2.0})
    again = RunConfig.from_toml(config.to_toml())
    _, model = build(again)
    assert model.denoiser.net.scale == 2.0
    with pytest.raises(ValueError, match=r"cannot load the network .*there is no Other in"):
        configure(["--network", f"{tmp_path / 'own.py'}:Other"])
    with pytest.raises(UsageError, match=r"unknown option --network\.depth"):
        configure(["--network", name, "--network.depth", "2"])
