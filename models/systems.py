"""The trained systems that a test compares, ready to sample."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metadata_manager import (
    BASELINES,
    CONTROLS,
    EXPERIMENTS,
    FLOWS,
    METHODS,
    PRESETS,
    EvaluationConfig,
    Metadata,
    RunConfig,
    stage_folder,
)
from models import checkpoint
from models.atfm import ATFM
from models.baselines import CLASSES, Baseline
from models.baselines.stepwise import Stepwise
from models.flags import experiment
from models.gtr import GTR, TrainedOn
from models.loading import Images, flow_of, load_baseline, load_flow, load_gtr, refuse_overlap
from models.processes import in_bfloat16, precision_of
from models.released import released_flow, released_gtr

Sampler = Callable[..., Tensor]


@dataclass(frozen=True)
class System:
    """A trained system with its way of sampling, a row of the test's table.

    sample(image (b, c, h, w), n, generator=None) -> probabilities (b, n, h, w). nfe: network evaluations per
    sample. parameters: how many all its networks have. checkpoints: its files, the flow's last."""

    label: str
    method: str
    sample: Sampler
    nfe: int
    parameters: int
    checkpoints: tuple[str, ...]
    trained_on: TrainedOn
    weights: str | None  # a fingerprint of all its networks
    alpha: float | None = None  # which of --alphas
    solver: str | None = None
    steps: int | None = None
    precision: str = "float32"  # of its networks
    preset: str = "paper"  # under which it was trained; custom: with other choices
    training: dict[str, dict[str, Any]] = field(default_factory=dict)  # stage -> all its settings


@dataclass(frozen=True)
class RowOfMethod:
    """What an entry of --methods asks for: a method trained under a preset, such as atfm-best."""

    method: str
    preset: str

    @classmethod
    def of(cls, name: str, preset: str) -> "RowOfMethod":
        """The row that a name means; preset: of the test, for a name without one.

        Raises ValueError, naming the flag, for another name."""
        known = ("act-gtr", *CONTROLS, *METHODS)
        # The test's preset holds for a name that does not end in one.
        for ending in PRESETS:
            if name not in known and name.endswith(f"-{ending}"):
                name, preset = name.removesuffix(f"-{ending}"), ending
        if name not in known:
            raise ValueError(f"--methods {name}: unknown; expected some of {', '.join(known)}, each perhaps "
                             f"with -{' or -'.join(PRESETS)} at its end")
        return cls(name, preset)

    def label(self, trained_as: str) -> str:
        """The row's name: with the preset in brackets, unless it is the paper's."""
        return self.method if trained_as == "paper" else f"{self.method} ({trained_as})"


def load_systems(config: EvaluationConfig, metadata: Metadata, run: RunConfig, device: torch.device,
                 control: Callable[[str, Sampler], Sampler], test: Images | None = None) -> list[System]:
    """The systems that the flags of a test name, ready to sample on a device.

    control(method, sample): the sampler of one of CONTROLS, made from GTR's. test: the images to be tested
    on; None: the user's images, which are resized. Raises ValueError for a system that was trained on images
    to be tested on or on their patients, or on images of another size."""
    # Flags are checked before the first checkpoint is read.
    rows = [RowOfMethod.of(name, run.preset) for name in config.methods]
    check_flags(config, [row.method for row in rows])
    check_checkpoint_flags(config, metadata, rows)
    checkpoints = Checkpoints(config, metadata, run, device, test)
    systems: list[System] = []
    for row in rows:
        if row.method not in METHODS:
            systems.append(act_gtr(row, checkpoints, control))
            continue
        for alpha in config.alphas if config.alphas and row.method in FLOWS else (None,):
            systems += trained_systems(row, alpha, checkpoints)
    # Results are stored by label, so that two systems may not share one.
    labels = [system.label for system in systems]
    twice = sorted({name for name in labels if labels.count(name) > 1})
    if twice:
        raise ValueError(f"--methods {' '.join(config.methods)}: two rows would be called {twice[0]}; "
                         "expected each system once")
    return systems


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of a test: the files of --gtr and --prior, or those in the folders of --output_path."""

    config: EvaluationConfig
    metadata: Metadata
    run: RunConfig
    device: torch.device
    test: Images | None
    gtrs: dict[str, GTR] = field(default_factory=dict)  # by preset, each loaded once

    def find(self, flag: str | None, folder: str) -> Path:
        """The file that a flag means, or without one that of a folder of --output_path."""
        return checkpoint.find(flag or Path(self.run.output_path or "runs") / folder, folder)

    def gtr(self, preset: str) -> GTR:
        """The GTR of a preset, on the device."""
        if preset not in self.gtrs:
            path = self.find(self.config.gtr, stage_folder("GTR", preset))
            if self.config.released_checkpoint:
                gtr = released_gtr(path, experiment(self.metadata.what, preset).gtr, self.metadata)
            else:
                gtr = load_gtr(path, self.metadata, same_size=self.test is not None)
            # GTR saw its training images' masks: a test on them would be too good, with any flow after it.
            refuse_overlap(gtr.trained_on, self.test, self.config.allow_overlap)
            self.gtrs[preset] = gtr.to(self.device)
        return self.gtrs[preset]

    def system(self, row: RowOfMethod, alpha: float | None) -> ATFM | Baseline:
        """A system of step 2, on the device; alpha: of one of several flows."""
        path = self.find(self.config.prior, stage_folder(row.method, row.preset, alpha))
        # The user's images are resized, so that any size will do. GTR is loaded only where a system needs it.
        same_size, gtr = self.test is not None, partial(self.gtr, row.preset)
        system: ATFM | Baseline
        if self.config.released_checkpoint and row.method in BASELINES:
            raise ValueError(f"--released_checkpoint True: not for {row.method}, only for GTR and the flows")
        if self.config.released_checkpoint:
            # The authors' files have weights only; the settings are those of the preset.
            settings = experiment(self.metadata.what, row.preset, row.method).flow
            system = released_flow(path, flow_of(settings, gtr, self.metadata), self.metadata)
        elif row.method in BASELINES:
            system = load_baseline(path, row.method, self.metadata, same_size)
        else:
            system = load_flow(path, row.method, gtr, self.metadata, same_size)
        refuse_overlap(system.trained_on, self.test, self.config.allow_overlap)
        return system.to(self.device)


def act_gtr(row: RowOfMethod, checkpoints: Checkpoints, control: Callable[[str, Sampler], Sampler]) -> System:
    """GTR's samples without a flow, or a control over them."""
    gtr = checkpoints.gtr(row.preset)
    trained_on = gtr.trained_on
    return System(
        row.label(trained_on.preset), row.method,
        gtr.sample if row.method == "act-gtr" else control(row.method, gtr.sample),
        nfe=0, parameters=size(gtr), checkpoints=(str(trained_on.path),), trained_on=trained_on,
        weights=checkpoint.fingerprint(gtr),
        precision=precision_of(checkpoints.device, checkpoints.run, False),
        preset=trained_on.preset, training={"GTR": trained_on.settings})


def trained_systems(row: RowOfMethod, alpha: float | None, checkpoints: Checkpoints) -> list[System]:
    """A system of step 2, once for each way of sampling that the test asks for."""
    config, device = checkpoints.config, checkpoints.device
    system = checkpoints.system(row, alpha)
    # In the order of training: the last part is the system of this row.
    parts = {} if system.gtr is None else {"GTR": system.gtr.trained_on}
    parts[row.method] = trained_on = system.trained_on
    name, weights = row.label(trained_on.preset), checkpoint.fingerprint(system)
    amp = in_bfloat16(config.amp, device)
    # Baselines compute in float32, whatever --amp says.
    return [System(label(name, config, alpha, way), row.method, sample, system.nfe(**way), size(system),
                   tuple(str(part.path) for part in parts.values()), trained_on, weights, alpha, **way,
                   precision=precision_of(device, checkpoints.run, amp and row.method in FLOWS),
                   preset=trained_on.preset,
                   training={stage: part.settings for stage, part in parts.items()})
            for way, sample in ways_to_sample(system, config, amp)]


def size(module: nn.Module) -> int:
    """The number of a module's parameters."""
    return sum(weight.numel() for weight in module.parameters())


def ways_to_sample(system: ATFM | Baseline, config: EvaluationConfig, amp: bool
                   ) -> Iterator[tuple[dict[str, Any], Sampler]]:
    """The ways of sampling that a test asks for, each with its sample function; amp: of a flow's net."""
    # None: the system does not sample in steps.
    numbers: tuple[int | None, ...] = (None,) if system.steps is None else config.steps or (system.steps,)
    if isinstance(system, Baseline):
        for steps in numbers:
            if steps is not None and steps > system.most_steps:
                raise ValueError(f"--steps {steps}: {type(system).__name__} has {system.most_steps} at most")
            yield {"steps": steps}, partial(system.sample, steps=steps, batch_size=config.batch_size)
        return
    # One copy for all ways: it is compiled once.
    fast = system.for_sampling(amp, config.channels_last, config.compile)
    for solver, steps in product(config.solver or (system.objective.solver,), numbers):
        way: dict[str, Any] = {"solver": solver, "steps": steps}
        yield way, partial(fast.sample, **way, batch_size=config.batch_size)


def check_flags(config: EvaluationConfig, methods: Sequence[str]) -> None:
    """Raises ValueError for a flag of a test that none of its systems has."""
    flows = [method for method in methods if method in FLOWS]
    stepwise = [method for method in methods if issubclass(CLASSES.get(method, Baseline), Stepwise)]
    # A flag that does nothing would leave someone believing that it did.
    without_effect = [] if flows else ["solver", "amp", "channels_last", "compile", "alphas"]
    without_effect += [] if flows or stepwise else ["steps"]
    for name in without_effect:
        # "auto" is the default of --amp, "False" what the baselines do anyway.
        if getattr(config, name) and getattr(config, name) not in ("auto", "False"):
            raise ValueError(f"--{name}: none of --methods {' '.join(config.methods)} has it; leave it out")


def check_checkpoint_flags(config: EvaluationConfig, metadata: Metadata, rows: Sequence[RowOfMethod]
                           ) -> None:
    """Raises ValueError for flags that name a single checkpoint where a test needs several, or others."""
    if config.released_checkpoint and metadata.what not in EXPERIMENTS:
        raise ValueError(f"--released_checkpoint True: the authors' weights are not for {metadata.what}")
    trained = {row for row in rows if row.method in METHODS}
    if config.prior is not None and (len(trained) > 1 or config.alphas):
        raise ValueError(f"--prior names one system, but --methods {' '.join(config.methods)} asks for "
                         f"{len(trained)}; leave --prior out, the folders of --output_path are taken")
    if config.gtr is not None and len({row.preset for row in rows}) > 1:
        raise ValueError(f"--gtr names one GTR, but --methods {' '.join(config.methods)} asks for those of "
                         "several presets; leave --gtr out, the folders of --output_path are taken")


def label(name: str, config: EvaluationConfig, alpha: float | None, way: dict[str, Any]) -> str:
    """A row's name, with the settings of sampling that vary between the rows."""
    varying = [f"alpha {alpha:g}"] if alpha is not None else []
    varying += [str(way["solver"])] if "solver" in way and len(config.solver) > 1 else []
    varying += [f"{way['steps']} steps"] if way["steps"] and len(config.steps) > 1 else []
    return ", ".join([name, *varying])
