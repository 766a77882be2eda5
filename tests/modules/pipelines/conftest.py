"""A tiny pipeline with two text encoders, and what it draws with all weights in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from assets import one_torch_thread
from recipes import quiet
from tiny_pipelines import picture, save_pipeline


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flux")
    with quiet():
        save_pipeline("FluxPipeline", folder)
    return folder


@pytest.fixture(scope="module")
def drawn(flux: Path) -> torch.Tensor:
    import diffusers

    with quiet(), one_torch_thread():
        return picture(diffusers.FluxPipeline.from_pretrained(flux))
