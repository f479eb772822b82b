"""Compiles the optional kernels while the package is built.

Where there is no C compiler, or it fails, the package is built without them: PyTorch then does
the work, more slowly, and ``safelight doctor`` says so. ``CC`` and ``CFLAGS`` are honoured;
``SAFELIGHT_NO_KERNELS=1`` leaves the kernels out.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = Path("src/safelight/runtime/kernels")
LIBRARY = FOLDER / "libsafelight.so"
FLAGS = (
    "-std=c11 -O3 -fPIC -shared -fopenmp -fno-math-errno -fno-trapping-math -fno-signed-zeros "
    "-ffp-contract=fast"
)
"""Nothing that reorders sums: equal input must give equal output whatever the compiler."""


class KernelsHook(BuildHookInterface):
    """Adds the compiled library to the wheel, and the wheel's tag for this machine."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = Path(self.root)
        (root / LIBRARY).unlink(missing_ok=True)
        if self.target_name != "wheel" or not _compile(root):
            return
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
        build_data["artifacts"].append(str(LIBRARY))


def _compile(root: Path) -> bool:
    compiler = os.environ.get("CC") or next(
        filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None
    )
    if compiler is None or sys.platform != "linux" or os.environ.get("SAFELIGHT_NO_KERNELS"):
        return False
    sources = sorted(str(path.relative_to(root)) for path in (root / FOLDER).glob("*.c"))
    wide = ["-mprefer-vector-width=512"] if platform.machine() in ("x86_64", "AMD64") else []
    command = [
        *shlex.split(compiler),
        *FLAGS.split(),
        *wide,
        *shlex.split(os.environ.get("CFLAGS", "")),
        "-o",
        str(LIBRARY),
        *sources,
        "-lm",
    ]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    except OSError as error:
        print(f"safelight: built without kernels: {error}", file=sys.stderr)
        return False
    if done.returncode:
        (root / LIBRARY).unlink(missing_ok=True)
        print(f"safelight: built without kernels:\n{done.stderr}", file=sys.stderr)
    return done.returncode == 0
