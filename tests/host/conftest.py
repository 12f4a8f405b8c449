"""Fixtures of this folder: a tiny SD x4 upscaler as diffusers saves it."""

import shutil

import pytest

from quanttune.tests.host import upscalers


@pytest.fixture(scope="session")
def upscaler_pipeline(comfy_inprocess):
    """A `StableDiffusionUpscalePipeline` of random weights; not to be changed."""
    return upscalers.tiny_pipeline()


@pytest.fixture(scope="session")
def saved_upscaler(upscaler_pipeline, tmp_path_factory):
    """Its folder; not to be changed."""
    folder = tmp_path_factory.mktemp("pipeline") / "x4"
    upscaler_pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def upscaler_folder(saved_upscaler, host_folders):
    """The same where the host looks for it, listed as "x4/", the test's own to spoil."""
    return shutil.copytree(saved_upscaler, host_folders / "models" / "diffusers" / "x4")
