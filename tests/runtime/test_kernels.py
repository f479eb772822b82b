"""The C kernels against PyTorch in float64, and networks that train with them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from micro_models import MICRO
from safelight.nets.unet import UNet
from safelight.nets.vae import VAE
from safelight.runtime import kernels, training
from safelight.runtime.kernels import norm

needs_kernels = pytest.mark.skipif(
    kernels.library() is None, reason="no C compiler when the package was built"
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _apart(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach()
    return float((found - expected).abs().max() / expected.abs().max())


SHAPES = [  # rows, channels, height, width, groups
    (2, 24, 7, 5, 8),  # a period that the cells do not fill evenly
    (1, 64, 1, 1, 16),
    (1, 320, 9, 9, 32),  # fewer rows than threads
    (5, 16, 33, 31, 4),
]


@needs_kernels
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-6), (torch.bfloat16, 8e-3)])
def test_norm_and_its_gradients(
    shape: tuple[int, ...], silu: bool, dtype: torch.dtype, limit: float, threads: int
) -> None:
    rows, channels, height, width, groups = shape
    x = torch.randn(rows, channels, height, width) * 2 + 3 * torch.randn(channels)[:, None, None]
    x, dy = x.to(dtype), torch.randn(x.shape).to(dtype)
    weight, bias = torch.randn(channels), torch.randn(channels)

    inputs = [t.double().requires_grad_() for t in (x, weight, bias)]
    expected = F.group_norm(inputs[0], groups, *inputs[1:], 1e-5)
    expected = F.silu(expected) if silu else expected
    expected.backward(dy.double())

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ours = [t.clone().requires_grad_() for t in (x, weight, bias)]
        found = norm.group_norm(*ours, groups, 1e-5, silu=silu)  # type: ignore[arg-type]
        found.backward(dy)
    finally:
        torch.set_num_threads(before)
    assert found.dtype == dtype
    assert _apart(found, expected) < limit
    for mine, reference in zip(ours, inputs, strict=True):
        assert mine.grad is not None
        assert reference.grad is not None
        # One cell a group normalises to nothing: its gradient is rounding around zero.
        if float(reference.grad.abs().max()) > 1e-6:
            assert _apart(mine.grad, reference.grad) < max(limit, 1e-5)


@needs_kernels
def test_silu_far_out_is_finite_and_right() -> None:
    x = torch.linspace(-200, 200, 4096).view(1, 16, 16, 16)
    flat = torch.ones(16), torch.zeros(16)
    found = norm.group_norm(x * 1e3, *flat, 1, 1e-5, silu=True)
    expected = F.silu(F.group_norm((x * 1e3).double(), 1, eps=1e-5))
    assert _apart(found, expected) < 2e-6
    steep = norm.group_norm(x, flat[0] * 300, flat[1], 1, 1e-5, silu=True)
    assert bool(torch.isfinite(steep).all())
    assert float(steep.min()) > -0.3  # SiLU's least value is -0.278


@needs_kernels
def test_norm_lets_nan_through_in_its_own_row_only() -> None:
    x = torch.randn(3, 16, 4, 4)
    x[1, 3, 2, 2] = torch.nan
    found = norm.group_norm(x, torch.ones(16), torch.zeros(16), 1, 1e-5, silu=True)
    assert bool(found[1].isnan().all())
    assert not bool(found[[0, 2]].isnan().any())


def _unet() -> tuple[nn.Module, tuple[Tensor, ...]]:
    inputs = torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999]), torch.randn(3, 5, 16)
    return UNet(MICRO.unet), inputs


def _vae() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return VAE(MICRO.vae), (torch.randn(2, 3, 32, 32), torch.randn(2, 4, 4, 4))


@pytest.mark.parametrize("build", [_unet, _vae])
@pytest.mark.parametrize("built", [True, False], ids=["kernels", "no kernels"])
def test_a_hastened_network_learns_the_same(
    build: object, built: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not built:
        monkeypatch.setattr(training, "library", lambda: None)
    module, inputs = build()  # type: ignore[operator]
    plain = copy.deepcopy(module)
    training.hasten(module)
    gradients = []
    for each in (plain, module):
        out = each(*inputs)
        out = out[0] if isinstance(out, tuple) else out
        out.square().mean().backward()
        gradients.append({name: p.grad for name, p in each.named_parameters()})
    for name, expected in gradients[0].items():
        assert expected is not None
        scale = float(expected.abs().max()) + 1e-4
        assert float((gradients[1][name] - expected).abs().max()) < 2e-4 * scale, name


def test_a_copy_of_a_hastened_network_runs_its_own_weights() -> None:
    module, inputs = _unet()
    training.hasten(module)
    before = module(*inputs)
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert torch.equal(twin(*inputs), before)
    assert not torch.equal(module(*inputs), before)


def test_under_autocast_attention_scores_are_float32() -> None:
    module, inputs = _unet()
    training.hasten(module)
    seen: list[torch.dtype] = []
    original = F.scaled_dot_product_attention

    def record(query: Tensor, *rest: Tensor) -> Tensor:
        seen.append(query.dtype)
        return original(query, *rest)

    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        patch.setattr(F, "scaled_dot_product_attention", record)
        module(*inputs)
    assert seen
    assert set(seen) == {torch.float32}


@needs_kernels
def test_a_row_is_the_same_in_any_company_and_on_any_number_of_threads() -> None:
    x = torch.randn(5, 32, 48, 40)
    flat = torch.randn(32), torch.randn(32)
    together = norm.group_norm(x, *flat, 8, 1e-5, silu=True)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        alone = norm.group_norm(x[3:4], *flat, 8, 1e-5, silu=True)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone[0], together[3])
