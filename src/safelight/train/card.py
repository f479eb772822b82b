"""Model cards for the shipped weights, from what a run recorded.

    python -m safelight.train.card runs/tiny/v1 --recipe recipes/tiny/v1.toml --texts v1.json \\
        --evaluation runs/evaluation/report.md -o src/safelight/family/tiny-v/README.md
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from safelight.train.emissions import (
    WATTS_PER_CORE,
    WATTS_PER_GIB,
    WORLD,
    estimate,
    processor_watts,
)


def energy(seconds: float, cores: float, gib: float) -> tuple[float, float]:
    """Estimated energy in kWh and emissions in kg of CO2.

    ``kWh = hours * (cores * 12 W + GiB * 0.4 W) / 1000``; ``kg = 0.4 * kWh``.
    """
    return estimate(seconds / 3600, processor_watts(cores, gib))


def card(
    title: str,
    about: str,
    run: Path,
    recipe: Path,
    *,
    cores: float,
    hardware: str,
    evaluation: str,
    limitations: str,
) -> str:
    """The card of one weights file, as Markdown."""
    last = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()][-1]
    seconds = float(last["seconds"])
    kwh, kg = energy(seconds, cores, 24)
    numbers = "\n".join(
        f"| {name} | {value} |" for name, value in last.items() if name not in ("seen", "seconds")
    )
    return f"""# {title}

{about}

Licence: Apache-2.0. Data: still life, the procedural world of `safelight.data.stilllife`; no
picture of a person, a place or another's work was used.

## Training

| | |
|---|---|
| recipe | `{recipe.as_posix()}` (below) |
| pictures seen | {last["seen"]:,} |
| time | {seconds / 60:.0f} minutes |
| hardware | {hardware} |
| energy | about {kwh:.3f} kWh, {1000 * kg:.0f} g of CO2: an estimate, not a measurement |

The estimate: hours x ({cores:g} cores x {WATTS_PER_CORE:g} W + 24 GiB x {WATTS_PER_GIB:g} W) / 1000
kWh, and {WORLD:g} kg of CO2 a kWh.

On validation pictures, at the end of the run:

| | |
|---|---|
{numbers}

## Evaluation

{evaluation}

## Limitations

{limitations}

## Recipe

```toml
{recipe.read_text().strip()}
```
"""


def main(arguments: list[str] | None = None) -> None:
    """See the file's head; the texts come from a JSON file of :func:`card`'s arguments."""
    parser = argparse.ArgumentParser(prog="python -m safelight.train.card")
    parser.add_argument("run", type=Path)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True, help="JSON with the card's texts")
    parser.add_argument("--evaluation", type=Path, help="Markdown that replaces the text's own")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    texts = json.loads(options.texts.read_text())
    if options.evaluation is not None:
        texts["evaluation"] = options.evaluation.read_text().strip()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(card(run=options.run, recipe=options.recipe, **texts))


if __name__ == "__main__":
    main()
