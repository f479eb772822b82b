"""3x3 convolutions, layer by layer: Winograd's, in C, against what PyTorch offers.

    python -m benchmarks.convolutions [--tiny] [--threads 1]

The peers are oneDNN's: NCHW (what diffusers runs), channels-last, and channels-last with weights
laid out before; behind a nearest 2x, interpolation with each of those, and one transposed
convolution with weights laid out before. Results are compared in float64 first.

The last column is how many of the multiplications that Winograd leaves (36 of 144, 25 behind a
doubling) are done in a second, in percent of a 2048³ matrix product on the same threads.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import measure
from safelight.nets.layers import Upsample
from safelight.runtime.kernels import winograd
from safelight.runtime.layers import Up
from safelight.runtime.plan import Plan, pack, packed_conv

SHORT = 3e-3
"""Seconds below which a call is repeated: the clock would be what is measured."""


class Layer(NamedTuple):
    """A convolution of a batch: ``size`` is that of the input."""

    batch: int
    inputs: int
    outputs: int
    size: int
    doubled: bool = False

    @property
    def name(self) -> str:
        """As in the table."""
        twice = ", after 2x" if self.doubled else ""
        return f"{self.inputs}→{self.outputs} at {self.size}², batch {self.batch}{twice}"

    @property
    def products(self) -> float:
        """Multiplications and additions of the plain sum."""
        cells = self.size**2 * (4 if self.doubled else 1)
        return 2.0 * 9 * self.batch * self.inputs * self.outputs * cells


TINY = (
    Layer(2, 64, 64, 16),
    Layer(2, 192, 64, 16),
    Layer(2, 128, 128, 8),
    Layer(32, 128, 128, 8),
    Layer(2, 128, 128, 8, True),
    Layer(1, 128, 128, 16),
    Layer(1, 128, 128, 16, True),
    Layer(1, 64, 64, 32),
    Layer(1, 32, 32, 64),
    Layer(1, 16, 16, 128),
)
FULL = (
    Layer(2, 320, 320, 64),
    Layer(2, 960, 320, 64),
    Layer(2, 640, 640, 32),
    Layer(2, 640, 640, 32, True),
    Layer(2, 1280, 1280, 16),
    Layer(2, 2560, 1280, 16),
    Layer(2, 1280, 1280, 8),
    Layer(1, 512, 512, 128),
    Layer(1, 512, 512, 128, True),
    Layer(1, 256, 256, 256),
    Layer(1, 128, 128, 512),
)


def main() -> None:
    parser = measure.options(__doc__ or "", rounds=5)
    parser.add_argument("--tiny", action="store_true", help="the tiny family's layers only")
    options = parser.parse_args()
    if winograd.level() < 0:
        raise SystemExit("The package was built without kernels: there is nothing to measure.")
    torch.set_num_threads(options.threads)
    report = measure.Report("convolutions", "3x3 convolutions, layer by layer")
    report.clean = measure.quiet(force=options.force)
    clock = measure.clock(options, report)
    report.notes.append(f"Instruction set: {('portable', 'AVX2', 'AVX-512')[winograd.level()]}.")
    with torch.inference_mode():
        for layer in TINY if options.tiny else TINY + FULL:
            sides, apart = sides_of(layer)
            times = in_turns(sides, options.rounds, clock)
            row = measure.compare(layer.name, times, difference=apart)
            report.rows.append(row)
            left = layer.products * (25 if layer.doubled else 36) / 144
            rate = 100 * left / row.ours / product_rate(clock)
            nchw = statistics.median(times["NCHW"]) / row.ours
            report.notes.append(
                f"* {layer.name}: {nchw:.2f} times as fast as NCHW; {rate:.0f} % of sgemm."
            )
    if options.no_write:
        print(report.markdown())
    else:
        report.write()


def sides_of(layer: Layer) -> tuple[dict[str, Callable[[], Tensor]], str]:
    """One layer every way, and how far ours is from float64."""
    generator = torch.Generator().manual_seed(0)
    shape = (layer.batch, layer.inputs, layer.size, layer.size)
    x = torch.randn(shape, generator=generator)
    weight = torch.randn(layer.outputs, layer.inputs, 3, 3, generator=generator)
    weight = weight.div_((9 * layer.inputs) ** 0.5)
    bias = torch.randn(layer.outputs, generator=generator)
    last, weight_last = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    packed = pack(weight, (1, 1), (1, 1))
    ours = winograd.transform(weight, doubled=layer.doubled)

    def doubled(t: Tensor) -> Tensor:
        return F.interpolate(t, scale_factor=2.0, mode="nearest") if layer.doubled else t

    sides = {
        "safelight": lambda: winograd.convolve(last, ours, bias),
        "NCHW": lambda: F.conv2d(doubled(x), weight, bias, padding=1),
        "channels-last": lambda: F.conv2d(doubled(last), weight_last, bias, padding=1),
        "packed": lambda: packed_conv(doubled(last), packed, bias, (1, 1), (1, 1)),
    }
    if layer.doubled:
        block = Upsample(layer.inputs)
        block.conv.weight, block.conv.bias = nn.Parameter(weight), nn.Parameter(bias)
        up = Up(block, Plan(winograd=False))
        sides["transposed"] = lambda: up(last)
    some = min(16, layer.outputs)  # float64 is slow
    expected = F.conv2d(doubled(x[:1]).double(), weight[:some].double(), bias[:some].double(), 1, 1)
    found = sides["safelight"]()[:1, :some]
    return sides, f"{float((found - expected).abs().max() / expected.abs().max()):.1e}"


def in_turns(
    sides: dict[str, Callable[[], Tensor]], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """As :func:`benchmarks.measure.in_turns`, short calls repeated."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for k in range(-1, rounds):
        for name in names[k % len(names) :] + names[: k % len(names)]:
            began, count = clock(), 0
            while count == 0 or clock() - began < SHORT:
                sides[name]()
                count += 1
            if k >= 0:
                times[name].append((clock() - began) / count)
    return times


def product_rate(clock: Callable[[], float] = time.perf_counter) -> float:
    """Floating-point operations a second of a matrix product."""
    a = torch.ones(2048, 2048)
    best = float("inf")
    for _ in range(3):
        began = clock()
        torch.mm(a, a)
        best = min(best, clock() - began)
    return 2 * 2048.0**3 / best


if __name__ == "__main__":
    main()
