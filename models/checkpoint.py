"""Checkpoints: dictionaries of tensors, numbers and strings, never half-written, loaded without any code."""

import hashlib
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from metrics.files import whole_file

# Raised by one when the meaning of a key changes.
FORMAT = 1
# What every checkpoint has; by this, files of other programs are told from ours.
PARTS = {"format": int, "stage": str, "config": dict, "model": dict}


def save(path: Path, content: dict[str, Any]) -> None:
    """Writes a whole checkpoint or, raising OSError, none: then the previous one is intact."""
    with whole_file(path) as file:
        try:
            torch.save({"format": FORMAT, **content}, file)
        # torch reports a failed write, such as on a full disk, as a RuntimeError.
        except RuntimeError as error:
            raise OSError(str(error)) from error


def load(path: Path, stage: str | None = None) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU. stage: "GTR" or a method, which the checkpoint must be of.

    Raises FileNotFoundError, or ValueError for a damaged file, one that is not ours, another format or stage.
    """
    content = _read(path)
    held = content if isinstance(content, dict) else {}
    # First, because what follows reads these parts.
    missing = [name for name, kind in PARTS.items() if not isinstance(held.get(name), kind)]
    if missing:
        raise ValueError(f"{path}: a file of tensors, but not a checkpoint of this project (no "
                         f"{', '.join(missing)}); for weights of the authors' code pass "
                         "--released_checkpoint True --preset released")
    if content["format"] != FORMAT:
        raise ValueError(f"{path}: checkpoint format {content['format']}, written by "
                         f"{content.get('versions')}; this version reads format {FORMAT}; load it with those "
                         "versions, or train again")
    if stage is not None and content["stage"] != stage:
        raise ValueError(f"{path}: a checkpoint of stage {content['stage']}, expected {stage}; "
                         "check --gtr, --prior and --method")
    return content


def state_dict(path: Path) -> dict[str, torch.Tensor]:
    """The weights in a file of the authors' code, perhaps under the key state_dict; errors as in `load`."""
    content = _read(path)
    weights = content.get("state_dict", content) if isinstance(content, dict) else content
    values = weights.values() if isinstance(weights, dict) else [None]
    if not all(isinstance(value, torch.Tensor) for value in values):
        raise ValueError(f"{path}: expected a dict of tensors, as torch.save(model.state_dict(), path) "
                         "writes it")
    return weights


def find(place: str | Path, stage: str) -> Path:
    """The checkpoint that a flag means: that file, or the best one of a folder or of its sub-folder `stage`.

    So --gtr and --prior take a run's top folder, the folder of one step, or a file."""
    place = Path(place)
    # A file that does not exist is returned, too: loading it says so by its name.
    if not place.is_dir():
        return place
    inner = place / stage / "best.pt"
    return inner if inner.exists() and not (place / "best.pt").exists() else place / "best.pt"


def _read(path: Path) -> Any:
    try:
        _check_sums(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path}: no such checkpoint; train that stage first (its first validation writes best.pt), or "
            "name another folder or file by --gtr (step 1) or --prior (step 2)") from None
    # These name the file and say all that there is to say.
    except (PermissionError, IsADirectoryError):
        raise
    # A damaged file can provoke any exception.
    except Exception as error:
        reason = str(error).strip().splitlines()[-1] if str(error) else type(error).__name__
        raise ValueError(f"{path}: not a readable checkpoint ({reason}); "
                         "take another one of the run, or train it again") from error


def _check_sums(path: Path) -> None:
    """Raises ValueError for a damaged zip file; torch ignores checksums, so damage passes for weights."""
    # torch itself says what is wrong, or reads a format that is older than its zip files.
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        # torch stores its parts without compression. Checked first, because `testzip` reads all of them.
        if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
            raise ValueError("its parts claim more bytes than it has")
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"{damaged} in it does not match its checksum")


def fill(module: nn.Module, content: dict[str, Any], path: Path) -> None:
    """Loads the model's weights, strictly; raises ValueError naming the file if they do not fit."""
    try:
        module.load_state_dict(content["model"], strict=True)
    except RuntimeError as error:
        raise ValueError(
            f"{path}: its weights do not fit the model that its config describes: {error}") from error


def fingerprint(module: nn.Module | None) -> str | None:
    """16 hex digits that change with any weight."""
    if module is None:
        return None
    digest = hashlib.blake2b(digest_size=8)
    for name, weight in module.state_dict().items():
        # With the names, because the same numbers in other places are other weights.
        digest.update(name.encode() + weight.cpu().numpy().tobytes())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """The versions of what computes the results."""
    return {"python": sys.version.split()[0], "torch": str(torch.__version__), "numpy": np.__version__}
