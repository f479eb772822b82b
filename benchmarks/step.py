"""One guided UNet step at the size of SD 1.5, random weights, against diffusers.

    python -m benchmarks.step [--sizes 256 512]

One step is one network call for both branches at a timestep of its own, the prompts' keys and
values known from the step before, as in a run; diffusers recomputes them, as it does in a run.
Weights are shared by both sides, except where a layout is a copy.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.parity_nets import unet_config
from safelight import presets
from safelight.conditioning import Conditioning
from safelight.model import Model
from safelight.nets.unet import UNet
from safelight.nets.vae import VAE
from safelight.runtime import Row
from safelight.spec import VAESpec

TARGET = 1.0


def main() -> None:
    parser = measure.options(__doc__ or "", rounds=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512], help="in pixels")
    parser.add_argument("--tiny", action="store_true", help="the tiny UNet: a rehearsal")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report = measure.Report("step", "One guided UNet step at the size of SD 1.5")
    report.clean = measure.quiet(force=options.force)
    clock = measure.clock(options, report)
    spec = presets.TINY if options.tiny else presets.SD_V1
    with torch.inference_mode():
        unet = random_unet(spec.unet)
        # The decoder takes no part; the smallest one will do.
        small = spec.replace(vae=VAESpec(channels=(8, 8, 8, 8), layers_per_block=1, norm_groups=4))
        model = Model(spec=small, unet=unet, vae=VAE(small.vae))
        eager, last = peer(unet), peer(unet).to(memory_format=torch.channels_last)
        for size in options.sizes:
            sides, apart = at_size(model, eager, last, size)
            times = measure.in_turns(sides, rounds=options.rounds, clock=clock)
            report.rows.append(measure.compare(f"{size}²", times, target=TARGET, difference=apart))
    report.notes.append(f"Ours: {', '.join(model.kernels)}.")
    if options.no_write:
        print(report.markdown())
    else:
        report.write()


def at_size(
    model: Model, eager: Any, last: Any, size: int
) -> tuple[dict[str, Callable[[], Tensor]], str]:
    """One step on every side, and how far the results are apart."""
    cells, spec = size // 8, model.spec.unet
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, cells, cells, generator=generator)
    tokens = [torch.randn(77, spec.context_width, generator=generator) for _ in range(2)]
    branches = [Conditioning(each) for each in tokens]
    both = torch.stack(tokens)

    def ours(timestep: float) -> Tensor:
        return model.runtime.predict([Row(x, timestep, branch) for branch in branches])

    def theirs(net: Any, timestep: float) -> Tensor:
        latents = torch.cat([x, x])  # what its pipeline does each step
        return net(latents, timestep, encoder_hidden_states=both, return_dict=False)[0]

    expected = theirs(eager, 500.0)
    gap = float((ours(500.0) - expected).abs().max() / expected.std())
    sides = {
        "safelight": stepping(ours),
        "diffusers": stepping(lambda t: theirs(eager, t)),
        "diffusers, channels-last": stepping(lambda t: theirs(last, t)),
    }
    return sides, f"{gap:.1e} of a standard deviation"


def stepping(call: Callable[[float], Tensor]) -> Callable[[], Tensor]:
    """Every call at another timestep, from late to early, as a run goes."""
    steps = itertools.cycle(range(981, 0, -20))
    return lambda: call(float(next(steps)))


def random_unet(spec: Any) -> UNet:
    """Weights of unit gain, several times faster than PyTorch's own initialisation."""
    return random_net(UNet, spec)


def random_net(kind: Callable[[Any], Any], spec: Any) -> Any:
    """The same of any network."""
    with torch.device("meta"):
        net = kind(spec)
    net.to_empty(device="cpu").requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in net.named_parameters():
        if parameter.ndim > 1:
            parameter.uniform_(-1, 1, generator=generator).mul_(parameter[0].numel() ** -0.5)
        else:
            parameter.fill_(float("norm" in name and name.endswith("weight")))
    return net


def peer(unet: UNet) -> Any:
    """diffusers' network over our tensors."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        net = UNet2DConditionModel(**unet_config(unet.spec))
    net.load_state_dict(unet.state_dict(), assign=True)
    return net.requires_grad_(False).eval()


if __name__ == "__main__":
    main()
