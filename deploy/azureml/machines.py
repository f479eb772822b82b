"""The card's machines as a table, and whether one of them will do.

python machines.py                                  # the table
python machines.py --check Standard_NC6s_v3 --for inference
python machines.py --profile fast --get online      # a profile's setting, for scripts
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("machines.toml")
USES = ("inference", "finetune")


def read() -> dict[str, Any]:
    """The lists, the machines and the profiles."""
    return tomllib.loads(FILE.read_text(encoding="utf-8"))


def check(machine: str, use: str) -> None:
    """Stop the program where a machine is not on the card's list."""
    allowed = read()["lists"][use]
    if machine not in allowed:
        sys.exit(f"{machine} is not on the card's list for {use}: {', '.join(allowed)}")


def table() -> str:
    """All of it, for people."""
    data = read()
    lines = [f"{'machine':<28}{'vCPU':>5}{'GiB':>6}{'GPUs':>5}  {'GPU':<12}used for"]
    for name, each in data["machines"].items():
        uses = ", ".join(use for use in USES if name in data["lists"][use])
        gpu = f"{each['gpu']} {each['gpu_memory_gib']}"
        numbers = f"{each['vcpus']:>5}{each['memory_gib']:>6}{each['gpus']:>5}"
        lines.append(f"{name:<28}{numbers}  {gpu:<12}{uses}")
    return "\n".join(lines)


def main() -> None:
    """Print, or check."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", metavar="MACHINE")
    parser.add_argument("--for", dest="use", choices=USES, default="inference")
    parser.add_argument("--profile", choices=tuple(read()["profiles"]), default="fp32")
    parser.add_argument("--get", choices=("online", "batch", "dtype", "concurrency"))
    given = parser.parse_args()
    if given.check:
        check(given.check, given.use)
    elif given.get:
        print(read()["profiles"][given.profile][given.get])
    else:
        print(table())


if __name__ == "__main__":
    main()
