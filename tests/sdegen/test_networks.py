"""Backbones: one interface, any shape, the start at zero, conditioning that works."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sdegen.networks import MLP, NETWORKS, UNet, network
from sdegen.networks.layers import attention, dropout


def awake(net: nn.Module) -> nn.Module:
    """The layers that start at zero, made random, so that everything matters."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            if not p.any():
                p.copy_(0.2 * torch.randn(p.shape, generator=g))
    return net.eval()


def inputs(event: tuple[int, ...], batch: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, *event, generator=torch.Generator().manual_seed(1)), torch.linspace(-8, 12, batch)


SHAPES = [(1, 8, 8), (3, 7, 5), (2, 28, 28), (1, 9, 16)]


@pytest.mark.parametrize("event", SHAPES)
@pytest.mark.parametrize("outputs", [1, 5])
@pytest.mark.parametrize("name", list(NETWORKS))
def test_shape_and_the_start_at_zero(name: str, outputs: int, event: tuple[int, ...]) -> None:
    net = NETWORKS[name](event, outputs)
    z, logsnr = inputs(event)
    out = net(z, logsnr)
    assert out.shape == (4, outputs * event[0], *event[1:])
    assert not out.any()
    assert awake(net)(z, logsnr).any()
    assert net.event_shape == event


@pytest.mark.parametrize(
    "options",
    [
        {"channels": (8,)},  # no down-sampling
        {"channels": (8, 16, 24), "blocks": 2, "attention": (1, 2)},
        {"channels": (12, 20), "attention": ()},
        {"channels": (8, 16), "octaves": (3, 4), "space_to_depth": 2},
    ],
    ids=str,
)
def test_unet_options_and_every_weight_is_used(options: dict) -> None:
    net = awake(UNet((2, 8, 12), 3, **options))
    z, logsnr = inputs((2, 8, 12))
    net(z, logsnr).square().sum().backward()
    idle = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    # a key's bias shifts all scores of a pixel alike, which softmax does not see; nothing else may be idle
    assert idle == []


@pytest.mark.parametrize("net", [MLP((1, 8, 8), width=32), UNet((1, 8, 8), channels=(8, 16))], ids=["mlp", "unet"])
def test_examples_do_not_see_each_other(net: nn.Module) -> None:
    z, logsnr = inputs((1, 8, 8))
    awake(net)
    with torch.no_grad():
        together = net(z, logsnr)
        apart = torch.cat([net(z[i : i + 1], logsnr[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", list(NETWORKS))
def test_the_noise_level_matters(name: str) -> None:
    net = awake(NETWORKS[name]((1, 8, 8)))
    z, _ = inputs((1, 8, 8))
    with torch.no_grad():
        answers = [net(z, torch.full((4,), level)) for level in (-9.0, -8.0, 0.0, 0.5, 8.0, 13.0)]
    for i, a in enumerate(answers):
        for b in answers[:i]:
            assert float((a - b).abs().max()) > 1e-3


@pytest.mark.parametrize("name", list(NETWORKS))
def test_classes_and_the_null_class(name: str) -> None:
    net = NETWORKS[name]((1, 8, 8), classes=3)
    z, logsnr = inputs((1, 8, 8))
    cond = torch.tensor([0, 1, 2, -1])
    awake(net)
    with torch.no_grad():
        without, with_ = net(z, logsnr), net(z, logsnr, cond)
        none = net(z, logsnr, torch.full((4,), -1))
    torch.testing.assert_close(none, without)  # -1 is "no class", as is cond=None
    torch.testing.assert_close(with_[3], without[3])
    assert all(float((with_[i] - without[i]).abs().max()) > 1e-3 for i in range(3))
    with pytest.raises(IndexError):
        net(z, logsnr, torch.tensor([0, 1, 2, 3]))
    with pytest.raises(ValueError, match="no classes"):
        NETWORKS[name]((1, 8, 8))(z, logsnr, cond)


def test_bad_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"images of shape \(C, H, W\), not \(2,\)"):
        UNet((2,))
    with pytest.raises(ValueError, match="space_to_depth=2 must divide the image size 7x8"):
        UNet((1, 7, 8), space_to_depth=2)
    with pytest.raises(ValueError, match="5 levels are too many for images of 8x8"):
        UNet((1, 8, 8), channels=(8,) * 5)
    with pytest.raises(ValueError, match="levels from 0 to 1"):
        UNet((1, 8, 8), attention=(2,))
    with pytest.raises(ValueError, match="channels must be at least 1, not -8"):
        UNet((1, 8, 8), channels=(8, -8))
    with pytest.raises(ValueError, match="depth must be at least 0, not -1"):
        MLP((2,), depth=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_keeps_share_and_mean(dtype: torch.dtype) -> None:
    x = torch.ones(333, 1001, dtype=dtype)
    with torch.random.fork_rng(()):
        torch.manual_seed(0)
        y = dropout(x, 0.25, True)
        torch.manual_seed(0)
        assert torch.equal(y, dropout(x, 0.25, True))  # the global generator decides
        assert not torch.equal(y, dropout(x, 0.25, True))
    assert y.dtype == dtype
    assert float((y == 0).float().mean()) == pytest.approx(0.25, abs=0.005)
    assert float(y.float().mean()) == pytest.approx(1, abs=0.005)
    zero = (y == 0).float()
    for lag in (1, 7, 8, 1001):  # neighbours in one 64-bit word are independent
        a, b = zero.flatten()[:-lag], zero.flatten()[lag:]
        assert float(((a - a.mean()) * (b - b.mean())).mean()) == pytest.approx(0, abs=2e-3)
    assert dropout(x, 0.25, False) is x
    assert dropout(x, 0.0, True) is x


def test_attention_is_the_fused_kernel() -> None:
    q, k, v = torch.randn(3, 2, 4, 9, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(attention(q, k, v), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("signature", "said"),
    [
        ("(event_shape, outputs)", "got an unexpected keyword argument 'classes'"),
        ("(event_shape, *, classes=0)", "too many positional arguments"),
    ],
)
def test_a_network_of_ones_own_that_is_built_in_another_way_is_told_how(tmp_path, signature: str, said: str) -> None:
    file = tmp_path / "net.py"
    file.write_text(
        f"def net{signature}: ...\ndef right(event_shape, outputs, *, classes=0, width=8): ...\nnumber = 3\n"
    )
    with pytest.raises(ValueError, match=rf"net is built as Net\(event_shape, outputs, \*, classes=0, ...\): {said}$"):
        network(f"{file}:net")
    with pytest.raises(ValueError, match="3 is not a callable object"):
        network(f"{file}:number")
    assert network(f"{file}:right").__name__ == "right"
