"""Folders with micro models, as the reference libraries write them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from diffusers import DDIMScheduler

from store.store_micro import make_pipeline, make_tokenizer


@pytest.fixture(scope="session")
def v1_template(tmp_path_factory) -> Path:
    """A v1-like folder as diffusers writes it; copy it before changing it."""
    folder = tmp_path_factory.mktemp("v1") / "micro"
    make_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def v1(v1_template, tmp_path) -> Path:
    return Path(shutil.copytree(v1_template, tmp_path / "micro"))


@pytest.fixture(scope="session")
def v2_template(tmp_path_factory) -> Path:
    """A v2-like folder: linear projections, v-prediction, DDIM, padding with "!"."""
    folder = tmp_path_factory.mktemp("v2") / "micro2"
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipeline = make_pipeline(scheduler, use_linear_projection=True, attention_head_dim=[2, 4])
    pipeline.register_modules(tokenizer=make_tokenizer("!"))
    pipeline.save_pretrained(folder)
    return folder
