"""Trained models from checkpoints, and what the checkpoints of a run say about it.

What a model was trained on is checked here: channels, size, and that no test image is among it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from metadata_manager import (
    METHODS,
    Config,
    EvaluationConfig,
    FlowConfig,
    GTRConfig,
    Metadata,
    RunConfig,
    experiment,
    flow_folder,
)
from models import checkpoint
from models.atfm import ATFM
from models.flow import EVALUATIONS_PER_STEP
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

    stage: "GTR", or the method of a flow. gtr: the one that the flow is trained over."""
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
    trained = content["config"]
    if trained["channels"] != metadata.channels:
        raise ValueError(f"{path}: trained on {trained['channels']}-channel images of {trained['what']}, but "
                         f"{metadata.what} has {metadata.channels}; check --gtr")
    gtr = GTR.of(_restored(GTRConfig, trained), metadata.channels)
    checkpoint.fill(gtr, content, path)
    gtr.trained_on = _images_of(path, content, metadata if same_size else None)
    return gtr.eval()


def load_flow(path: Path, method: str, gtr: GTR | None, metadata: Metadata, same_size: bool = True) -> ATFM:
    """A trained flow over the GTR that gives its x_0.

    Prints a line if it was trained over another GTR. Raises ValueError if it was trained with another method
    or, if `same_size`, on images of another size."""
    content = checkpoint.load(path, method)
    config = _restored(FlowConfig, content["config"])
    atfm = ATFM(gtr, STNet.of(config, _restored(Metadata, content["config"]).seen_channels), config)
    if content["config"]["gtr_weights"] != checkpoint.fingerprint(atfm.gtr):
        print(f"warning: {path} was trained over another GTR than the one given")
    checkpoint.fill(atfm.net, content, path)
    atfm.trained_on = _images_of(path, content, metadata if same_size else None)
    return atfm.eval()


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


@dataclass(frozen=True)
class System:
    """A trained system with its way of sampling, a row of the test's table.

    sample(image (b, c, h, w), n, generator=None) -> probabilities (b, n, h, w). evaluations: of the network
    per sample. checkpoints: the files it is made of, the flow's last."""

    label: str
    method: str
    sample: Callable[..., Tensor]
    evaluations: int
    checkpoints: tuple[str, ...]
    trained_on: TrainedOn
    weights: str | None  # a fingerprint of all of them
    alpha: float | None = None  # of --alphas
    solver: str | None = None
    steps: int | None = None


def load_systems(config: EvaluationConfig, metadata: Metadata, run: RunConfig, device: torch.device,
                 control: Callable[[str, Callable[..., Tensor]], Callable[..., Tensor]],
                 test: Images | None = None) -> list[System]:
    """The systems that the flags of a test name, ready to sample on a device.

    control(method, sample): the sampler of one of CONTROLS, from GTR's. test: the images to be tested on;
    None: the user's own images, which are resized. Raises ValueError for a system that was trained on one of
    the images to be tested on or on their patients, or on images of another size."""
    flows = [method for method in config.methods if method in METHODS]
    if config.prior is not None and (len(flows) > 1 or config.alphas):
        raise ValueError(f"--prior names one flow, but --methods {' '.join(config.methods)} asks for "
                         f"{len(flows)}; leave --prior out, the folders of --output_path are taken")
    output = Path(run.output_path or "runs")
    gtr, gtr_path = None, checkpoint.find(config.gtr or output / "GTR", "GTR")
    if len(flows) < len(config.methods) or any(METHODS[method].get("source") != "normal" for method in flows):
        gtr = tested_gtr(gtr_path, config, metadata, run.preset, test).to(device)
    found: list[System] = []
    for method in config.methods:
        if method not in METHODS and gtr is not None:
            sample = gtr.sample if method == "act-gtr" else control(method, gtr.sample)
            found.append(System(method, method, sample, 0, (str(gtr_path),), gtr.trained_on,
                                checkpoint.fingerprint(gtr)))
            continue
        for alpha in config.alphas or (None,):
            folder = flow_folder(method, alpha)
            path = checkpoint.find(config.prior or output / folder, folder)
            atfm = tested_flow(path, method, gtr, config, metadata, run.preset, test).to(device)
            files = (str(path),) if atfm.gtr is None else (str(gtr_path), str(path))
            found += [System(label(method, config, alpha, solver, steps), method, sample, evaluations, files,
                             atfm.trained_on, checkpoint.fingerprint(atfm), alpha, solver, steps)
                      for solver, steps, sample, evaluations in ways_to_sample(atfm, config)]
    return found


def ways_to_sample(atfm: ATFM, config: EvaluationConfig
                   ) -> Iterator[tuple[str, int, Callable[..., Tensor], int]]:
    """Solver, steps, sample function and network evaluations per sample, for each that a test asks for."""
    objective = atfm.objective
    fast = atfm.for_sampling(config.amp, config.channels_last, config.compile)
    for solver, steps in product(config.solver or (objective.solver,), config.steps or (objective.steps,)):
        evaluations = steps * EVALUATIONS_PER_STEP[solver] * (1 if objective.guidance == 0 else 2)
        sample = partial(fast.sample, steps=steps, solver=solver, batch_size=config.batch_size)
        yield solver, steps, sample, evaluations


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
        trained = replace(experiment(metadata.what, preset).flow, **METHODS[method])
        return released_flow(path, trained, gtr, metadata)
    atfm = load_flow(path, method, gtr, metadata, same_size=test is not None)
    refuse_overlap(path, atfm.trained_on, test, config.allow_overlap)
    return atfm


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


def label(method: str, config: EvaluationConfig, alpha: float | None, solver: str, steps: int) -> str:
    """The method, with the settings that vary between the rows."""
    varying = [f"alpha {alpha:g}"] if alpha is not None else []
    varying += [solver] if len(config.solver) > 1 else []
    varying += [f"{steps} steps"] if len(config.steps) > 1 else []
    return ", ".join([method, *varying])
