"""What several test modules share: tiny data sets, a tiny run on one, and no paths of the user's."""

import multiprocessing
import os
import shutil
import time
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


@pytest.fixture
def no_pictures(monkeypatch):
    tiny.draw_nothing(monkeypatch)


@pytest.fixture(scope="session")
def run(lidc, tmp_path_factory) -> Path:
    """The folder of a run on LIDC, of one epoch of GTR and one of the flow."""
    import train_GTR  # here, so that tests of a module do not wait for the import of everything
    import train_prior_LIDC

    folder = tmp_path_factory.mktemp("run") / "LIDC"
    with pytest.MonkeyPatch.context() as patch:
        tiny.draw_nothing(patch)
        train_GTR.main([*tiny.GTR, *tiny.where(lidc, folder), "--epochs", "1"])
        train_prior_LIDC.main([*tiny.PRIOR, *tiny.where(lidc, folder), "--num_epochs", "1"])
    return folder


@pytest.fixture
def run_copy(run, tmp_path) -> Path:
    """A copy of it, to train and test more in."""
    return Path(shutil.copytree(run, tmp_path / "LIDC"))


@pytest.fixture(scope="session")
def processes():
    """Starts processes from one that has imported the project, so that each begins to work at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_GTR", "train_prior_LIDC"])
    first = context.Process(target=time.sleep, args=(0,))
    first.start()
    first.join()
    return context


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU that torch can use"))])
def device(request, monkeypatch) -> torch.device:
    """Each device that networks and scores run on, in full float32; CUDA is skipped where there is none."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return torch.device(request.param)
