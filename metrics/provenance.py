"""What a reader needs to trust or repeat a test: commit, hardware, what was tested, how it was trained."""

import json
import os
import platform
import subprocess
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metadata_manager import Metadata
from metrics.intervals import count_patients
from metrics.program import counted, table

ROOT = Path(__file__).parents[1]
# On a slow network drive git may take minutes, for which no test should wait.
GIT_SECONDS = 10


def commit() -> str | None:
    """The git commit of this project, -dirty if its files were changed since; None outside a repository."""
    # A copy of this project may lie, untracked, in the repository of another one.
    if _git("ls-files", "--error-unmatch", "metadata_manager.py") is None:
        return None
    head, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    return None if head is None or changes is None else head + ("-dirty" if changes else "")


def _git(*arguments: str) -> str | None:
    """What git prints, run in this project's folder; None where that fails or git is missing."""
    # A hook's variables would make git speak of the repository that the hook runs in.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True,
                              timeout=GIT_SECONDS, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None


def hardware(device: torch.device) -> str:
    """The device in words, and the machine's cores and threads."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    threads = torch.get_num_threads()
    return f"{name}, {counted(os.cpu_count() or 1, 'core')}, {counted(threads, 'thread')}"


def tested_text(metadata: Metadata, patients: Sequence | np.ndarray, seeds: Sequence[int]) -> str:
    """A line on what was tested: data set, pixels, images, patients, seeds."""
    return (f"Tested: {metadata.what}, {metadata.side} x {metadata.side} pixels, split {metadata.split}, "
            f"{counted(len(patients), 'image')} of {counted(count_patients(patients), 'patient')}, "
            f"{counted(len(seeds), 'seed')} of sampling ({', '.join(map(str, seeds))}).\n")


def training_section(report: Mapping[str, Any]) -> str:
    """Markdown: the commit, and a table per stage of its whole configuration in each system.

    report: of results.json. Systems with the same settings have one column, so that what differs stands side
    by side."""
    # Systems often use the same GTR, whose settings would otherwise fill a column for each of them.
    training = {label: system["training"] for label, system in report["systems"].items()}
    commit = report["commit"] or "unknown (not in a git repository)"
    text = f"\n## Training\n\nTested at commit {commit}.\n"
    # A dict keeps the order in which the stages come, unlike a set.
    stages = dict.fromkeys(stage for stages in training.values() for stage in stages)
    for stage in stages:
        labels_of = defaultdict(list)  # the stage's settings, as JSON -> labels of the systems that have them
        for label, of_system in training.items():
            if stage in of_system:
                # As JSON, since settings hold lists, which cannot be keys.
                labels_of[json.dumps(of_system[stage], default=str)].append(label)
        columns = {"; ".join(labels): training[labels[0]][stage] for labels in labels_of.values()}
        names = list(dict.fromkeys(name for settings in columns.values() for name in settings))
        text += "\n" + table([stage, *columns], [
            [name, *(_text(settings.get(name, "-")) for settings in columns.values())] for name in names])
    return text


def _text(value: Any) -> str:
    """A setting's value on one line of a table."""
    if isinstance(value, list | tuple):
        return " ".join(map(_text, value)) or "none"
    # A bar or a line break would end the cell.
    return str(value).replace("|", "/").replace("\n", " ")
