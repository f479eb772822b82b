"""From the command to the first answered step, against diffusers; and ``safelight --help``.

    python -m benchmarks.cold_start

Every run is a process of its own. Both sides read the same exported folder, encode the sentence
and answer the first step; then they go on to the saved picture, which is timed too.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import measure
from benchmarks.tiny_model import PROMPT

TARGET, HELP_SECONDS, STEPS = 2.0, 0.5, 25
MARK = "first step answered at"

OURS = """
import sys, time
from safelight.cli.main import main
from safelight.engine import Engine  # would be imported a moment later anyway
answer = Engine._call
def first(self, rows):
    prediction = answer(self, rows)
    print("first step answered at", time.time(), file=sys.stderr, flush=True)
    Engine._call = answer
    return prediction
Engine._call = first
main(sys.argv[1:])
"""

THEIRS = """
import sys, time
from diffusers import StableDiffusionPipeline
folder, prompt, steps, picture = sys.argv[1:]
pipe = StableDiffusionPipeline.from_pretrained(
    folder, safety_checker=None, requires_safety_checker=False, local_files_only=True
)
answer = pipe.unet.forward
def first(*arguments, **keywords):
    prediction = answer(*arguments, **keywords)
    print("first step answered at", time.time(), file=sys.stderr, flush=True)
    pipe.unet.forward = answer
    return prediction
pipe.unet.forward = first
pipe(prompt, num_inference_steps=int(steps)).images[0].save(picture)
"""

HELP = "from safelight.cli.main import main; main(['--help'])"

EXPORT = """
import sys
from pathlib import Path
from benchmarks import tiny_model
notes = []
model = tiny_model.tiny(notes)
tiny_model.export(model, Path(sys.argv[1]))
print(*notes, sep="\\n")
"""


def main() -> None:
    options = measure.options(__doc__ or "", rounds=5).parse_args()
    report = measure.Report("cold_start", "Cold start: from the command to the first step")
    if options.processor_time:
        raise SystemExit("a start is many processes: it is timed by the clock on the wall")
    report.clean = measure.quiet(force=options.force)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(options.threads),
        "HF_HUB_OFFLINE": "1",
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder, picture = Path(scratch) / "tiny", Path(scratch) / "picture.png"
        told = _run([sys.executable, "-c", EXPORT, str(folder)], environment)[1]
        report.notes += [line for line in told.splitlines() if line]
        ours = [sys.executable, "-c", OURS, "generate", PROMPT, "-m", str(folder)]
        ours += ["--steps", str(STEPS), "-o", str(picture), "--quiet"]
        theirs = [sys.executable, "-c", THEIRS, str(folder), PROMPT, str(STEPS), str(picture)]
        first: dict[str, list[float]] = {"safelight": [], "diffusers": []}
        whole: dict[str, list[float]] = {"safelight": [], "diffusers": []}
        usage: list[float] = []
        for k in range(-1, options.rounds):  # the first round fills the caches of the disk
            sides = [("safelight", ours), ("diffusers", theirs)]
            for name, command in sides if k % 2 else sides[::-1]:
                to_first, to_end = _timed(command, environment)
                if k >= 0:
                    first[name].append(to_first)
                    whole[name].append(to_end)
            seconds = _run([sys.executable, "-c", HELP], environment)[0]
            if k >= 0:
                usage.append(seconds)
    report.rows += [
        measure.compare("to the first step", first, target=TARGET),
        measure.compare(f"to the saved picture, {STEPS} steps", whole),
    ]
    met = statistics.median(usage) < HELP_SECONDS
    report.notes.append(
        f"`safelight --help`: {measure.median_text(usage)}; "
        f"target under {HELP_SECONDS} s {'✓' if met else '✗'}."
    )
    if options.no_write:
        print(report.markdown())
    else:
        report.write()


def _timed(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Seconds to the first answered step, which the child prints the time of, and to the end."""
    began = time.time()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    end = time.time()
    mark = re.search(rf"{MARK} ([\d.]+)", done.stderr)  # a progress bar may share its line
    if done.returncode or mark is None:
        raise SystemExit(f"failed with {done.returncode}:\n{done.stderr}")
    return float(mark[1]) - began, end - began


def _run(command: list[str], environment: dict[str, str]) -> tuple[float, str]:
    began = time.time()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"failed with {done.returncode}:\n{done.stderr}")
    return time.time() - began, done.stdout


if __name__ == "__main__":
    main()
