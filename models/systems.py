"""The trained systems that a test compares, ready to sample."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metadata_manager import (
    BASELINES,
    EXPERIMENTS,
    FLOWS,
    METHODS,
    EvaluationConfig,
    Metadata,
    RunConfig,
    flow_folder,
)
from models import checkpoint
from models.atfm import ATFM
from models.baselines import CLASSES, Baseline
from models.baselines.stepwise import Stepwise
from models.gtr import TrainedOn
from models.loading import Images, tested_baseline, tested_flow, tested_gtr
from models.processes import precision_of

Sampler = Callable[..., Tensor]


@dataclass(frozen=True)
class System:
    """A trained system with its way of sampling, a row of the test's table.

    sample(image (b, c, h, w), n, generator=None) -> probabilities (b, n, h, w). nfe: evaluations of the network
    per sample. parameters: of all its networks. checkpoints: the files it is made of, the flow's last."""

    label: str
    method: str
    sample: Sampler
    nfe: int
    parameters: int
    checkpoints: tuple[str, ...]
    trained_on: TrainedOn
    weights: str | None  # a fingerprint of all of them
    alpha: float | None = None  # of --alphas
    solver: str | None = None
    steps: int | None = None
    precision: str = "float32"  # of its networks
    preset: str = "paper"  # that it was trained under; custom: with other choices
    training: dict[str, dict[str, Any]] = field(default_factory=dict)  # stage -> its whole configuration


def load_systems(config: EvaluationConfig, metadata: Metadata, run: RunConfig, device: torch.device,
                 control: Callable[[str, Sampler], Sampler], test: Images | None = None) -> list[System]:
    """The systems that the flags of a test name, ready to sample on a device.

    control(method, sample): the sampler of one of CONTROLS, from GTR's. test: the images to be tested on;
    None: the user's own images, which are resized. Raises ValueError for a system that was trained on one of
    the images to be tested on or on their patients, or on images of another size."""
    check_flags(config)
    if config.released_checkpoint and metadata.what not in EXPERIMENTS:
        raise ValueError(f"--released_checkpoint True: the authors' weights are not for {metadata.what}")
    trained = [method for method in config.methods if method in METHODS]
    if config.prior is not None and (len(trained) > 1 or config.alphas):
        raise ValueError(f"--prior names one system, but --methods {' '.join(config.methods)} asks for "
                         f"{len(trained)}; leave --prior out, the folders of --output_path are taken")
    output = Path(run.output_path or "runs")
    gtr, gtr_path = None, checkpoint.find(config.gtr or output / "GTR", "GTR")
    if any(needs_gtr(method) for method in config.methods):
        gtr = tested_gtr(gtr_path, config, metadata, run.preset, test).to(device)
    found: list[System] = []
    for method in config.methods:
        if method not in METHODS and gtr is not None:
            sample = gtr.sample if method == "act-gtr" else control(method, gtr.sample)
            found.append(System(method, method, sample, 0, size(gtr), (str(gtr_path),), gtr.trained_on,
                                checkpoint.fingerprint(gtr), precision=precision_of(device, run, False)))
            continue
        for alpha in config.alphas if config.alphas and method in FLOWS else (None,):
            folder = flow_folder(method, alpha)
            path = checkpoint.find(config.prior or output / folder, folder)
            system: ATFM | Baseline
            if method in BASELINES:
                system = tested_baseline(path, method, config, metadata, test).to(device)
            else:
                system = tested_flow(path, method, gtr, config, metadata, run.preset, test).to(device)
            files = (str(path),) if system.gtr is None else (str(gtr_path), str(path))
            weights = checkpoint.fingerprint(system)
            found += [System(label(method, config, alpha, way), method, sample, system.nfe(**way),
                             size(system), files, system.trained_on, weights, alpha, **way,
                             precision=precision_of(device, run, config.amp and method in FLOWS))
                      for way, sample in ways_to_sample(system, config)]
    return found


def needs_gtr(method: str) -> bool:
    """Whether a system draws from GTR: GTR itself, its controls, and the flows that begin at it."""
    return method not in BASELINES and FLOWS.get(method, {}).get("source") != "normal"


def size(module: nn.Module) -> int:
    """The number of a module's parameters."""
    return sum(one.numel() for one in module.parameters())


def ways_to_sample(system: ATFM | Baseline, config: EvaluationConfig
                   ) -> Iterator[tuple[dict[str, Any], Sampler]]:
    """The settings of sampling that a test asks for, each with its sample function."""
    numbers: tuple[int | None, ...] = (None,) if system.steps is None else config.steps or (system.steps,)
    if isinstance(system, Baseline):
        for steps in numbers:
            if steps is not None and steps > system.most_steps:
                raise ValueError(f"--steps {steps}: {type(system).__name__} has {system.most_steps} at most")
            yield {"steps": steps}, partial(system.sample, steps=steps, batch_size=config.batch_size)
        return
    fast = system.for_sampling(config.amp, config.channels_last, config.compile)
    for solver, steps in product(config.solver or (system.objective.solver,), numbers):
        way: dict[str, Any] = {"solver": solver, "steps": steps}
        yield way, partial(fast.sample, **way, batch_size=config.batch_size)


def check_flags(config: EvaluationConfig) -> None:
    """Raises ValueError for a flag of a test that none of its systems has."""
    flows = [method for method in config.methods if method in FLOWS]
    stepwise = [method for method in config.methods if issubclass(CLASSES.get(method, Baseline), Stepwise)]
    unheeded = [] if flows else ["solver", "amp", "channels_last", "compile", "alphas"]
    unheeded += [] if flows or stepwise else ["steps"]
    for name in unheeded:
        if getattr(config, name):
            raise ValueError(f"--{name}: none of --methods {' '.join(config.methods)} has it; leave it out")


def label(method: str, config: EvaluationConfig, alpha: float | None, way: dict[str, Any]) -> str:
    """The method, with the settings that vary between the rows."""
    varying = [f"alpha {alpha:g}"] if alpha is not None else []
    varying += [str(way["solver"])] if "solver" in way and len(config.solver) > 1 else []
    varying += [f"{way['steps']} steps"] if way["steps"] and len(config.steps) > 1 else []
    return ", ".join([method, *varying])
