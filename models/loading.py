"""Trained models from checkpoints, and what the checkpoints of a run say about it.

What a model was trained on is checked here: channels, size, and that no test image is among it.
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
# Settings that runs of earlier versions have, and what the code now always does.
REMOVED = {"groups": 1, "draws": 1, "times": "uniform", "objective": "velocity", "coupling": "independent",
           "path_noise": 0.0, "condition": "image", "residual": False, "nll_weight": 0.0}
# Settings that a run may change when it goes on: none alters what a step computes, beyond rounding.
CHANGEABLE = {"data_path", "epochs", "num_epochs", "gtr", "alphas", "solver", "steps", "temperature",
              "annotators_per_pass", "images_per_pass", "recompute", "channels_last", "compile",
              "checkpoint"}  # `recompute` in older files
DIFFERENCES = {"gtr_weights": "over another GTR", "training_images": "on other images"}


class Images(Protocol):
    """What a dataset says of its images; patients: of each."""

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
        # A flow is of a preset if its GTR is, too.
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

    Prints a line if it was trained over another GTR. Raises ValueError if it was trained with another method
    or, if `same_size`, on images of another size."""
    content = checkpoint.load(path, method)
    config, of_images = (settings_in(content, kind, path) for kind in (FlowConfig, Metadata))
    # By the training's data set: whether the net sees grey images does not depend on this test's flags.
    atfm = flow_of(config, gtr, of_images)
    if content["config"]["gtr_weights"] != checkpoint.fingerprint(atfm.gtr):
        print(f"warning: {path} was trained over another GTR than the one given")
    checkpoint.fill(atfm.net, content, path)
    atfm.trained_on = _trained_on(path, content, metadata if same_size else None)
    return atfm.eval()


def flow_of(config: FlowConfig, gtr: Callable[[], GTR], metadata: Metadata) -> ATFM:
    """A flow with an untrained network, as a config describes it, for images of `metadata`."""
    over_gtr = source_named(config.source).over_gtr
    return ATFM(gtr() if over_gtr else None, network(config, metadata.flow_channels), config,
                annotators_per_pass=config.annotators_per_pass, images_per_pass=config.images_per_pass,
                amp=config.amp == "True")  # "auto" was settled where the device is known, or is for sampling


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

    A setting that was added since has its default, which is what the code did before. Raises ValueError for a
    setting that was removed since, unless it had the value that the code now always has."""
    refuse_removed(content, path)
    known = {setting.name for setting in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in content["config"].items() if name in known})


def refuse_removed(content: dict[str, Any], path: Path) -> None:
    """Raises ValueError where a run had a setting of REMOVED at another value than the code has now."""
    trained = content["config"]
    # The flow's temperature softened x_0; GTR's, which came later, is another thing.
    removed = REMOVED if content["stage"] == "GTR" else REMOVED | {"temperature": 1.0}
    for name, value in removed.items():
        if trained.get(name, value) != value:
            raise ValueError(f"{path}: trained with {name} {trained[name]}, which this version does not have "
                             "any more; use the commit that the run's versions name, or train again")


def refuse_other_settings(content: dict[str, Any], current: dict[str, Any], path: Path) -> None:
    """Raises ValueError unless a run can go on with the settings `current`."""
    refuse_removed(content, path)
    changeable = CHANGEABLE | REMOVED.keys()
    # More epochs would move a falling learning rate, and where the energy score takes over.
    if current.get("schedule", "constant") != "constant" or current.get("loss", "nll") != "nll":
        changeable -= {"epochs", "num_epochs"}
    if content["stage"] in BASELINES:  # which are in float32, whatever it says
        changeable |= {"amp"}
    # What runs did before there was a setting is its default.
    kinds = (Metadata, GTRConfig if content["stage"] == "GTR" else FlowConfig)
    defaults = {setting.name: setting.default for kind in kinds for setting in fields(kind)}
    trained = defaults | content["config"]
    trained["amp"] = str(trained.get("amp"))  # a boolean once
    different = [DIFFERENCES.get(name) or f"{name} {trained.get(name)} there, {current.get(name)} here"
                 for name in sorted((content["config"].keys() | current.keys()) - changeable)
                 if trained.get(name) != current.get(name)]
    if different:
        raise ValueError(f"{path}: a run with other settings ({'; '.join(different)}); use those, "
                         "another --output_path, or delete the folder")


def _trained_on(path: Path, content: dict[str, Any], metadata: Metadata | None) -> TrainedOn:
    """What a checkpoint was trained on; raises ValueError if it has another size than `metadata`'s images."""
    trained = content["config"]
    side = trained["crop"] or trained["size"]
    if metadata is not None and side != metadata.side:
        raise ValueError(f"{path}: trained on {side} x {side} pixels, but images have {metadata.side} x "
                         f"{metadata.side} here; pass the same --crop to all stages")
    return TrainedOn(side, trained["channels"], tuple(content["training_ids"]),
                     tuple(content.get("training_patients", ())), content.get("preset", "custom"), trained,
                     path)


def refuse_overlap(trained_on: TrainedOn, test: Images | None, allowed: bool) -> None:
    """Raises ValueError, or prints a line if `allowed`, if a model was trained on test images or patients.

    Patients who are only numbered may be others of another file: of these it prints a line."""
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
