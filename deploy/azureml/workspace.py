"""Shared by the Python samples: the workspace, and what every deployment needs.

pip install azure-ai-ml azure-identity
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import machines
from azure.ai.ml import MLClient, load_environment, load_model
from azure.core.exceptions import ResourceNotFoundError
from azure.identity import DefaultAzureCredential

HERE = Path(__file__).parent


def client() -> MLClient:
    """The workspace of SUBSCRIPTION, RESOURCE_GROUP and WORKSPACE."""
    names = [os.environ[name] for name in ("SUBSCRIPTION", "RESOURCE_GROUP", "WORKSPACE")]
    return MLClient(DefaultAzureCredential(), *names)


def machine(use: str, default: str) -> str:
    """MACHINE, where it is on the card's list."""
    chosen = os.environ.get("MACHINE", default)
    machines.check(chosen, use)
    return chosen


def profile(kind: str) -> Path:
    """The deployment's file in PROFILE (fp32, or fast)."""
    return HERE / machines.read()["profiles"][os.environ.get("PROFILE", "fp32")][kind]


def prepare(ml: MLClient) -> None:
    """The environments and the model, once."""
    if not (HERE / "environment" / "dist").is_dir():
        subprocess.run([HERE / "package.sh"], check=True)
    for name in ("environment.yml", "environment-server.yml"):
        ml.environments.create_or_update(load_environment(HERE / name))
    try:
        ml.models.get("stable-diffusion-v1-5", label="latest")
    except ResourceNotFoundError:
        ml.models.create_or_update(load_model(HERE / "model.yml"))
