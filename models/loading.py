"""Trained models from checkpoints, and what the checkpoints of a run say about it.

What a model was trained on is checked here: channels, size, and that no test image is among it.
"""

from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Protocol, TypeVar

from metadata_manager import (
    Config,
    EvaluationConfig,
    FlowConfig,
    GTRConfig,
    Metadata,
    experiment,
)
from models import checkpoint
from models.atfm import ATFM
from models.baselines import CLASSES, Baseline
from models.gtr import GTR, TrainedOn
from models.released import released_flow, released_gtr
from models.st_net import STNet

C = TypeVar("C", bound=Config)


class Images(Protocol):
    """What a dataset says of its images; patients: of each."""

    @property
    def ids(self) -> Sequence[str]: ...
    @property
    def patients(self) -> Sequence: ...
    @property
    def fingerprint(self) -> str: ...


def describe(stage: str, metadata: Metadata, config: Config, seed: int, images: Images,
             gtr: GTR | None = None) -> dict[str, Any]:
    """What each checkpoint of a run says about itself.

    stage: "GTR", or the method of step 2. gtr: the one that the flow is trained over."""
    return {
        "stage": stage,
        "config": {**asdict(metadata), **asdict(config), "seed": seed,  # type: ignore[call-overload]
                   "training_images": images.fingerprint, "gtr_weights": checkpoint.fingerprint(gtr)},
        "training_ids": list(images.ids),
        "training_patients": sorted({str(patient) for patient in images.patients}),
        "versions": checkpoint.versions(),
    }


def load_gtr(path: Path, metadata: Metadata, same_size: bool = True) -> GTR:
    """A trained GTR, in eval mode.

    Raises ValueError if it is for images of other channels or, if `same_size`, of another size."""
    content = checkpoint.load(path, "GTR")
    check_channels(path, content, metadata)
    gtr = GTR.of(_restored(GTRConfig, content["config"]), metadata.channels)
    checkpoint.fill(gtr, content, path)
    gtr.trained_on = _images_of(path, content, metadata if same_size else None)
    return gtr.eval()


def load_flow(path: Path, method: str, gtr: GTR | None, metadata: Metadata, same_size: bool = True) -> ATFM:
    """A trained flow over the GTR that gives its x_0.

    Prints a line if it was trained over another GTR. Raises ValueError if it was trained with another method
    or, if `same_size`, on images of another size."""
    content = checkpoint.load(path, method)
    config, of_images = _restored(FlowConfig, content["config"]), _restored(Metadata, content["config"])
    atfm = ATFM(gtr, STNet.of(config, config.condition_channels(of_images.seen_channels)), config)
    if content["config"]["gtr_weights"] != checkpoint.fingerprint(atfm.gtr):
        print(f"warning: {path} was trained over another GTR than the one given")
    checkpoint.fill(atfm.net, content, path)
    atfm.trained_on = _images_of(path, content, metadata if same_size else None)
    return atfm.eval()


def load_baseline(path: Path, method: str, metadata: Metadata, same_size: bool = True) -> Baseline:
    """A trained system of models/baselines, in eval mode; errors as in `load_gtr`."""
    content = checkpoint.load(path, method)
    check_channels(path, content, metadata)
    system = CLASSES[method](metadata.channels, _restored(FlowConfig, content["config"]))
    checkpoint.fill(system, content, path)
    system.trained_on = _images_of(path, content, metadata if same_size else None)
    return system.eval()


def check_channels(path: Path, content: dict[str, Any], metadata: Metadata) -> None:
    """Raises ValueError if a checkpoint is for images of other channels."""
    trained = content["config"]
    if trained["channels"] != metadata.channels:
        raise ValueError(f"{path}: trained on {trained['channels']}-channel images of {trained['what']}, but "
                         f"{metadata.what} has {metadata.channels}; check --gtr and --prior")


def _restored(kind: type[C], trained: dict[str, Any]) -> C:
    """The settings of one kind among those that a checkpoint was trained with."""
    known = {one.name for one in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in trained.items() if name in known})


def _images_of(path: Path, content: dict[str, Any], metadata: Metadata | None) -> TrainedOn:
    """What a checkpoint was trained on; raises ValueError if it has another size than `metadata`'s images."""
    trained = content["config"]
    side = trained["crop"] or trained["size"]
    if metadata is not None and side != metadata.side:
        raise ValueError(f"{path}: trained on {side} x {side} pixels, but images have {metadata.side} x "
                         f"{metadata.side} here; pass the same --crop to all stages")
    return TrainedOn(side, trained["channels"], tuple(content["training_ids"]),
                     tuple(content.get("training_patients", ())))


def tested_gtr(path: Path, config: EvaluationConfig, metadata: Metadata, preset: str,
               test: Images | None) -> GTR:
    """GTR from our checkpoint, not trained on test images, or from the authors' in the preset's layout."""
    if config.released_checkpoint:
        return released_gtr(path, experiment(metadata.what, preset).gtr, metadata)
    gtr = load_gtr(path, metadata, same_size=test is not None)
    refuse_overlap(path, gtr.trained_on, test, config.allow_overlap)
    return gtr


def tested_flow(path: Path, method: str, gtr: GTR | None, config: EvaluationConfig, metadata: Metadata,
                preset: str, test: Images | None) -> ATFM:
    """A flow from our checkpoint, not trained on test images, or from the authors' in the preset's layout."""
    if config.released_checkpoint:
        return released_flow(path, experiment(metadata.what, preset, method).flow, gtr, metadata)
    atfm = load_flow(path, method, gtr, metadata, same_size=test is not None)
    refuse_overlap(path, atfm.trained_on, test, config.allow_overlap)
    return atfm


def tested_baseline(path: Path, method: str, config: EvaluationConfig, metadata: Metadata,
                    test: Images | None) -> Baseline:
    """A system of models/baselines from our checkpoint, not trained on test images."""
    if config.released_checkpoint:
        raise ValueError(f"--released_checkpoint True: not for {method}, only for GTR and the flows")
    system = load_baseline(path, method, metadata, same_size=test is not None)
    refuse_overlap(path, system.trained_on, test, config.allow_overlap)
    return system


def refuse_overlap(path: Path, trained_on: TrainedOn, test: Images | None, allowed: bool) -> None:
    """Raises ValueError, or prints a line if `allowed`, if a model was trained on test images or patients.

    Patients who are only numbered may be others of another file: of these it prints a line."""
    if test is None:
        return
    ids, patients = set(test.ids), {str(patient) for patient in test.patients}
    both, known = ids & set(trained_on.ids), patients & set(trained_on.patients)
    if both:
        message = f"{path}: {len(both)} of the {len(ids)} test images were trained on"
    elif known:
        message = (f"{path}: it was trained on other images of {len(known)} of the {len(patients)} test "
                   f"patients, such as {min(known)}")
    else:
        return
    if not allowed and (both or not all(patient.isdecimal() for patient in known)):
        raise ValueError(f"{message}; test with the split that it was trained with, or pass "
                         "--allow_overlap True")
    print(f"warning: {message}")
