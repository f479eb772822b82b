"""What a picture of SD 1.5's size takes in memory, by plan, and diffusers'.

    python -m benchmarks.low_memory [--size 512] [--steps 2] [--stored float16]

Random weights in the published layout are written to a temporary folder (2.1 GB in float16). Each
side makes one picture in a process of its own, which reads its peak from the system: all that was
resident at once, mapped files included.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import measure

LIMIT = 3.0
"""GB of a 512x512 picture with ``low-memory``."""
SHARE = 1.1
"""Of diffusers' peak, with ``speed``."""

WRITE = """
import sys, torch
from pathlib import Path
from benchmarks.step import random_net
from safelight import presets, shipped
from safelight.nets.clip import TextTower
from safelight.nets.unet import UNet
from safelight.nets.vae import VAE
from safelight.store.folder import NOTES_FILE, write_folder
from safelight.text.tokenizer import Tokenizer
small = shipped.tokenizer(shipped.find("tiny"))
spec = presets.SD_V1
text = spec.text.replace(bos_id=small.bos_id, eos_id=small.eos_id, pad_id=small.eos_id)
spec = spec.replace(text=text)
tokenizer = Tokenizer.from_vocab(small.vocab, small.merges, context_length=77)
nets = {"unet": (UNet, spec.unet), "vae": (VAE, spec.vae), "text": (TextTower, text)}
states = {name: random_net(*how).half().state_dict() for name, how in nets.items()}
dtype = getattr(torch, sys.argv[2])
write_folder(Path(sys.argv[1]), spec, states, tokenizer, dtype=dtype)
(Path(sys.argv[1]) / NOTES_FILE).unlink()  # which the published folders lack
"""

CHILD = """
import json, sys, time
def peak():
    lines = open("/proc/self/status").read().splitlines()
    found = dict(line.split(":", 1) for line in lines)
    return {k: int(found[k].split()[0]) / 1e6 for k in ("VmHWM", "VmRSS")}
folder, side, size, steps, picture = sys.argv[1:]
size, steps = int(size), int(steps)
began, told = time.time(), {}
if side == "diffusers":
    import torch
    from diffusers import StableDiffusionPipeline
    pipe = StableDiffusionPipeline.from_pretrained(
        folder, safety_checker=None, requires_safety_checker=False, local_files_only=True,
        torch_dtype=torch.float32)
    told["loaded"] = time.time() - began, peak()
    def each(pipe, step, t, values):
        told[f"step {step + 1}"] = time.time() - began, peak()
        return values
    image = pipe("a red cube", num_inference_steps=steps, height=size, width=size,
                 callback_on_step_end=each).images[0]
else:
    import safelight
    generator = safelight.load(folder, device="cpu", plan=side)
    told["loaded"] = time.time() - began, peak()
    events = generator.stream("a red cube", seed=1, steps=steps, width=size, height=size)
    for event in events:
        name = type(event).__name__
        if name == "Progress":
            told[f"step {event.step}"] = time.time() - began, peak()
        elif name == "ImageResult":
            image = event.image
image.save(picture)
told["picture"] = time.time() - began, peak()
print(json.dumps(told))
"""


def main() -> None:
    parser = measure.options(__doc__ or "", rounds=1)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--stored", choices=("float16", "float32"), default="float16")
    parser.add_argument(
        "--sides", nargs="+", default=["low-memory", "speed", "reference", "diffusers"]
    )
    parser.add_argument("--folder", type=Path, help="keep the weights there, or find them there")
    options = parser.parse_args()
    measure.quiet(force=options.force)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch) / "sd15"
        if not (folder / "model_index.json").is_file():
            _run(WRITE, str(folder), options.stored, threads=options.threads)
        found = {}
        for side in options.sides:
            picture = str(Path(scratch) / f"{side}.png")
            arguments = (str(folder), side, str(options.size), str(options.steps), picture)
            found[side] = json.loads(_run(CHILD, *arguments, threads=options.threads))
            _tell(side, found[side])
        if {"low-memory", "reference"} <= set(found):
            print(
                f"low-memory is {_psnr(scratch, 'low-memory', 'reference'):.1f} dB from reference"
            )
    peaks = {side: told["picture"][1]["VmHWM"] for side, told in found.items()}
    if "low-memory" in peaks:
        met = "yes" if peaks["low-memory"] <= LIMIT else "NO"
        print(f"low-memory within {LIMIT} GB: {met}")
    if {"speed", "diffusers"} <= set(peaks):
        print(
            f"speed takes {peaks['speed'] / peaks['diffusers']:.2f} of diffusers'; at most {SHARE}"
        )


def _tell(side: str, told: dict[str, tuple[float, dict[str, float]]]) -> None:
    print(f"{side}:")
    for what, (seconds, memory) in told.items():
        print(
            f"  {what:10} {seconds:7.1f} s, {memory['VmRSS']:5.2f} GB, peak {memory['VmHWM']:5.2f}"
        )
    sys.stdout.flush()


def _psnr(scratch: str, one: str, other: str) -> float:
    import numpy as np
    from PIL import Image

    a, b = (np.asarray(Image.open(Path(scratch) / f"{s}.png"), dtype=float) for s in (one, other))
    error = float(((a - b) ** 2).mean())
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))


def _run(code: str, *arguments: str, threads: int) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"failed with {done.returncode}:\n{done.stderr}")
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


if __name__ == "__main__":
    main()
