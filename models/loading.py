"""Trained models from checkpoints, and what the checkpoints of a run say about it.

Checked here: that images have the channels and the size of those trained on, and that no test image was one.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Protocol, TypeVar

from metadata_manager import BASELINES, Config, FlowConfig, GTRConfig, Metadata, RunConfig
from models import checkpoint
from models.atfm import ATFM
from models.baselines import CLASSES, Baseline
from models.gtr import GTR, TrainedOn
from models.sources import source_named
from models.st_net import network

C = TypeVar("C", bound=Config)
# Settings of earlier versions, each with the value that stands for what the code now always does.
REMOVED = {"groups": 1, "draws": 1, "times": "uniform", "objective": "velocity", "coupling": "independent",
           "path_noise": 0.0, "condition": "image", "residual": False, "nll_weight": 0.0}
# Settings that a run may change when it goes on: none alters what a step computes, beyond rounding.
CHANGEABLE = {"data_path", "epochs", "num_epochs", "gtr", "alphas", "solver", "steps", "temperature", "tta",
              "annotators_per_pass", "images_per_pass", "recompute", "channels_last", "compile",
              "checkpoint"}  # `recompute` in older files
# The values of these are fingerprints, which say nothing to a reader: differences are told in words.
DIFFERENCES = {"gtr_weights": "over another GTR", "training_images": "on other images"}


class Images(Protocol):
    """What is asked of a dataset: ids and patients, one for each image, and a fingerprint of all."""

    @property
    def ids(self) -> Sequence[str]: ...
    @property
    def patients(self) -> Sequence: ...
    @property
    def fingerprint(self) -> str: ...


def describe(stage: str, metadata: Metadata, config: Config, run: RunConfig, images: Images,
             gtr: GTR | None = None) -> dict[str, Any]:
    """What each checkpoint of a run says about itself.

    stage: "GTR", or the method of step 2. gtr: the one that the flow is trained over."""
    return {
        "stage": stage,
        # A flow counts as trained under a preset only if its GTR was trained under it, too.
        "preset": run.trained_as if gtr is None or gtr.trained_on.preset == run.trained_as else "custom",
        "config": {**asdict(metadata), **asdict(config), "seed": run.seed,  # type: ignore[call-overload]
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
    gtr = GTR.of(settings_in(content, GTRConfig, path), metadata.channels)
    checkpoint.fill(gtr, content, path)
    gtr.trained_on = _trained_on(path, content, metadata if same_size else None)
    return gtr.eval()


def load_flow(path: Path, method: str, gtr: Callable[[], GTR], metadata: Metadata, same_size: bool = True
              ) -> ATFM:
    """A trained flow; gtr(): the GTR that gives its x_0, called where its source needs one.

    Prints a line if it was trained over another GTR. Raises ValueError if it was trained with another method,
    on images of other channels or, if `same_size`, of another size."""
    content = checkpoint.load(path, method)
    check_channels(path, content, metadata)
    config, of_images = (settings_in(content, kind, path) for kind in (FlowConfig, Metadata))
    # Built for the images of the training: whether the net sees them in grey does not depend on the flags of
    # this test.
    atfm = flow_of(config, gtr, of_images)
    # Only a warning: the flow runs from another x_0, too, and someone may want just that.
    if content["config"]["gtr_weights"] != checkpoint.fingerprint(atfm.gtr):
        print(f"warning: {path} was trained over another GTR than the one given")
    checkpoint.fill(atfm.net, content, path)
    atfm.trained_on = _trained_on(path, content, metadata if same_size else None)
    return atfm.eval()


def flow_of(config: FlowConfig, gtr: Callable[[], GTR], metadata: Metadata) -> ATFM:
    """A flow with an untrained network, as a config describes it, for images of `metadata`."""
    # gtr() is called only where it is needed: without it no checkpoint of step 1 has to exist.
    over_gtr = source_named(config.source).over_gtr
    # --amp auto is settled before training, see `settle_precision`; for sampling the test says it.
    return ATFM(gtr() if over_gtr else None, network(config, metadata.flow_channels), config,
                annotators_per_pass=config.annotators_per_pass, images_per_pass=config.images_per_pass,
                amp=config.amp == "True")


def load_baseline(path: Path, method: str, metadata: Metadata, same_size: bool = True) -> Baseline:
    """A trained system of models/baselines, in eval mode; errors as in `load_gtr`."""
    content = checkpoint.load(path, method)
    check_channels(path, content, metadata)
    system = CLASSES[method](metadata.channels, settings_in(content, FlowConfig, path))
    checkpoint.fill(system, content, path)
    system.trained_on = _trained_on(path, content, metadata if same_size else None)
    return system.eval()


def check_channels(path: Path, content: dict[str, Any], metadata: Metadata) -> None:
    """Raises ValueError if a checkpoint is for images of other channels."""
    trained = content["config"]
    if trained["channels"] != metadata.channels:
        raise ValueError(f"{path}: trained on {trained['channels']}-channel images of {trained['what']}, but "
                         f"{metadata.what} has {metadata.channels}; check --gtr and --prior")


def settings_in(content: dict[str, Any], kind: type[C], path: Path) -> C:
    """The settings of one kind that a checkpoint was trained with.

    A setting that is newer than the checkpoint has its default, which is what the code did before. Raises
    ValueError for a setting that was removed since, unless the code now always does what it said."""
    refuse_removed(content, path)
    # `content` has the settings of all kinds in one dictionary.
    known = {setting.name for setting in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in content["config"].items() if name in known})


def refuse_removed(content: dict[str, Any], path: Path) -> None:
    """Raises ValueError if a run had a setting of REMOVED at another value than the one given there."""
    trained = content["config"]
    # A flow once had a temperature, which softened x_0. GTR's, which came later, is another setting.
    removed = REMOVED if content["stage"] == "GTR" else REMOVED | {"temperature": 1.0}
    for name, value in removed.items():
        if trained.get(name, value) != value:
            raise ValueError(f"{path}: trained with {name} {trained[name]}, which this version does not have "
                             "any more; use the commit that the run's versions name, or train again")


def refuse_other_settings(content: dict[str, Any], current: dict[str, Any], path: Path) -> None:
    """Raises ValueError unless a run can go on with the settings `current`."""
    refuse_removed(content, path)
    changeable = CHANGEABLE | REMOVED.keys()
    # With these, a step depends on how many there are in all: more epochs would move the learning rate's
    # fall, or the step at which the energy score takes over.
    if current.get("schedule", "constant") != "constant" or current.get("loss", "nll") != "nll":
        changeable -= {"epochs", "num_epochs"}
    # Baselines compute in float32, whatever --amp says.
    if content["stage"] in BASELINES:
        changeable |= {"amp"}
    # Of a setting that is newer than the run, the default is what the run did.
    kinds = (Metadata, GTRConfig if content["stage"] == "GTR" else FlowConfig)
    defaults = {setting.name: setting.default for kind in kinds for setting in fields(kind)}
    trained = defaults | content["config"]
    # It was a boolean in earlier versions.
    trained["amp"] = str(trained.get("amp"))
    different = [DIFFERENCES.get(name) or f"{name} {trained.get(name)} there, {current.get(name)} here"
                 for name in sorted((content["config"].keys() | current.keys()) - changeable)
                 if trained.get(name) != current.get(name)]
    if different:
        raise ValueError(f"{path}: a run with other settings ({'; '.join(different)}); use those, "
                         "another --output_path, or delete the folder")


def _trained_on(path: Path, content: dict[str, Any], metadata: Metadata | None) -> TrainedOn:
    """What a checkpoint was trained on; raises ValueError if it has another size than `metadata`'s images."""
    # The size that the networks saw, after a crop.
    trained = content["config"]
    side = trained["crop"] or trained["size"]
    if metadata is not None and side != metadata.side:
        raise ValueError(f"{path}: trained on {side} x {side} pixels, but images have {metadata.side} x "
                         f"{metadata.side} here; pass the same --crop to all stages")
    # Older checkpoints have neither patients nor preset.
    return TrainedOn(side, trained["channels"], tuple(content["training_ids"]),
                     tuple(content.get("training_patients", ())), content.get("preset", "custom"), trained,
                     path)


def refuse_overlap(trained_on: TrainedOn, test: Images | None, allowed: bool) -> None:
    """Raises ValueError, or if `allowed` prints a line, where a model was trained on test images or patients.

    Patients that have only a number may be other people in another file: for them it prints a line."""
    # The user's images: nothing is scored on them.
    if test is None:
        return
    ids, patients = set(test.ids), {str(patient) for patient in test.patients}
    common_ids, common_patients = ids & set(trained_on.ids), patients & set(trained_on.patients)
    if common_ids:
        message = f"{trained_on.path}: {len(common_ids)} of the {len(ids)} test images were trained on"
    elif common_patients:
        message = (f"{trained_on.path}: it was trained on other images of {len(common_patients)} of the "
                   f"{len(patients)} test patients, such as {min(common_patients)}")
    else:
        return
    if not allowed and (common_ids or not all(patient.isdecimal() for patient in common_patients)):
        raise ValueError(f"{message}; test with the split that it was trained with, or pass "
                         "--allow_overlap True")
    print(f"warning: {message}")
