"""What several test modules share: tiny data sets, and an environment without the user's paths."""

import os
from pathlib import Path

import pytest
import torch

from tests import tiny

torch.set_num_threads(1)  # sums are rounded otherwise with more threads, and some tests ask for equal bits


@pytest.fixture(autouse=True)
def no_paths_of_the_user(monkeypatch):
    for name in list(os.environ):
        if name.startswith("ATFM_") and name.endswith("_PATH"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def lidc(tmp_path_factory) -> Path:
    return tiny.write_lidc_h5(tmp_path_factory.mktemp("lidc") / "lidc.h5")


@pytest.fixture(scope="session")
def lidc_folder(tmp_path_factory) -> Path:
    return tiny.write_lidc_folder(tmp_path_factory.mktemp("lidc_source") / "LIDC")


@pytest.fixture(scope="session")
def isic_folder(tmp_path_factory) -> Path:
    return tiny.write_isic_folder(tmp_path_factory.mktemp("isic_source") / "ISIC3")
