"""Command-line flags: every setting of metadata_manager's dataclasses is one.

Defaults < preset < method < flags. The defaults depend on three of the flags (--what, --preset, --method),
which are therefore read first.
"""

# argparse rather than tyro (1.0): tyro takes help and choices as annotations, and prints an error as a box.
import argparse
import json
import os
import typing
from collections.abc import Mapping, Sequence
from dataclasses import Field, fields, replace
from pathlib import Path
from typing import Any

import h5py

from metadata_manager import (
    BASELINES,
    EXPERIMENTS,
    FLOWS,
    PRESETS,
    Config,
    EvaluationConfig,
    Experiment,
    FlowConfig,
    GTRConfig,
    LoopConfig,
    Metadata,
    RunConfig,
    best,
    dataset,
    released,
)
from models.flow import SOLVERS
from models.gtr import BACKBONES
from models.sources import SOURCES
from models.st_net import NETWORKS

# Settings whose choices are the entries of a table: an entry that is added is a choice at once.
TABLES: dict[str, Mapping[str, Any]] = {
    "source": SOURCES, "backbone": BACKBONES, "network": NETWORKS, "solver": SOLVERS}
TITLES = {RunConfig: "every script", Metadata: "data", GTRConfig: "step 1, GTR",
          LoopConfig: "training loop", FlowConfig: "step 2, the flow", EvaluationConfig: "test"}


def experiment(what: str, preset: str = "paper", method: str | None = None) -> Experiment:
    """The settings of a data set under a preset and a method.

    what: a name in EXPERIMENTS, or an .h5 or .hdf5 file of `data.prepare`. method: one of METHODS. A flow's
    changes come last; a baseline has its paper's settings, or where the experiment is `small` the sizes of
    the flow there; Act. GTR and its control change nothing. Raises ValueError, naming the flag, for an
    unknown name of a data set or a preset."""
    if what not in EXPERIMENTS and what.lower().endswith((".h5", ".hdf5")):
        base = _from_file(Path(what).expanduser())
    else:
        metadata = dataset(what)
        base = replace(EXPERIMENTS[what], metadata=metadata,
                       run=replace(EXPERIMENTS[what].run, output_path=f"runs/{what}"))
    if preset not in PRESETS:
        raise ValueError(f"--preset {preset}: unknown; expected one of {', '.join(PRESETS)}")
    # The preset changes what the data set has, and a method, below, what the preset has.
    chosen = {"paper": lambda base: base, "released": released, "best": best}[preset](base)
    chosen = replace(chosen, run=replace(chosen.run, preset=preset))
    if method in BASELINES:
        # Nothing of the preset's flow: a baseline is trained as its paper says.
        _, recipe = BASELINES[method]
        # A small experiment compares at ATFM's sizes, for a CPU.
        if base.small:
            sizes = {name: getattr(base.flow, name) for name in ("batch_size", "lr", "ema", "dim")}
            recipe = {**sizes, "experts": recipe["experts"]}
        return replace(chosen, flow=FlowConfig(method=method, num_epochs=base.flow.num_epochs, **recipe))
    if method not in FLOWS:
        return chosen
    changes = FLOWS[method] | chosen.methods.get(method, {})
    return replace(chosen, flow=replace(chosen.flow, method=method, **changes))


def came_split(folds: set[str]) -> bool:
    """Whether images came split: what their ids begin with is train and test, perhaps val, nothing else."""
    return {"train", "test"} <= folds <= {"train", "val", "test"}


def _from_file(path: Path) -> Experiment:
    """The settings for a file of `data.prepare`; raises ValueError, naming --what, for one that is not.

    They are LIDC's up to 128 x 128 pixels and ISIC3's above, but without augmentation and with ST-Net at
    LIDC's width."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            # Grey images have no axis of channels.
            _, h, w, c = (*file["images"].shape, 1)[:4]
            # Eight pixels of masks are in a byte, and the last byte of a row may be filled up.
            k = 8 * file["masks_packed"].shape[1] // (h * w)
            # Images that came split have ids such as train/7.
            folds = {name.partition("/")[0] for name in file["id"].asstr()} if "id" in file else set()
            options = json.loads(file.attrs.get("prepared", "{}"))
    except (OSError, LookupError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"--what {path}: not a file of images and masks_packed ({error}); make it with "
                         "python -m data.prepare, or name its data set and pass --data_path") from error
    if h != w:
        raise ValueError(f"--what {path}: images of {h} x {w} pixels, expected square ones; python -m "
                         "data.prepare pads them")
    split = "file" if came_split(folds) else "group"
    metadata = Metadata(path.name, "cases", c, k, h, options.get("axis", "fewest"),
                        tuple(options.get("window", ())), str(path), grey=False, split=split)
    like = EXPERIMENTS["LIDC" if h <= 128 else "isic3_style_concat"]
    return replace(like, metadata=metadata, flow=replace(like.flow, dim=128),
                   run=RunConfig(output_path=f"runs/{path.stem}"))


def parse(argv: Sequence[str] | None, what: str, description: str, *kinds: type[Config]) -> list[Any]:
    """The settings of each of `kinds` that a command line asks for.

    what: the dataset if --what is not given. Exits with argparse's usage message for a flag that is misspelt
    or has a value of the wrong type. Raises ValueError for one that is out of range or needs another flag."""
    # The flags that the defaults of all others depend on. The others are left to the second parser.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--what", default=what)
    first.add_argument("--preset", default="paper")
    first.add_argument("--method", default=None)
    chosen, _ = first.parse_known_args(argv)

    parser = argparse.ArgumentParser(description=description.split("\n\n")[0], allow_abbrev=False)
    try:
        base = experiment(chosen.what, chosen.preset, chosen.method)
    except ValueError as error:
        parser.error(str(error))
    parser.add_argument("--what", default=what,
                        help=f"name of the dataset: {', '.join(EXPERIMENTS)}; or an .h5 file of your own, by "
                             f"data.prepare (default: {what})")
    defaults = [_part(base, kind) for kind in kinds]
    for config in defaults:
        group = parser.add_argument_group(TITLES[type(config)])
        for setting in _flags(config):
            _add_flag(group, setting, getattr(config, setting.name))
    # argparse makes lists; settings are tuples, which cannot be changed and compare equal to the defaults.
    given = {name: tuple(value) if isinstance(value, list) else value
             for name, value in vars(parser.parse_args(argv)).items()}
    configs: dict[type[Config], Any] = {
        type(config): replace(config, **{setting.name: given[setting.name] for setting in _flags(config)})
        for config in defaults}
    if given.get("channels_last") and not given["compile"]:
        raise ValueError("--channels_last True needs --compile True: uncompiled, each GroupNorm on CUDA "
                         "changes the layout back and each convolution forth; pass both, or neither")
    # A test trains nothing and so has neither.
    trained = configs.get(GTRConfig) or configs.get(FlowConfig)
    if trained is not None:
        label = preset_of(chosen.what, chosen.preset, chosen.method, configs[Metadata], trained)
        configs[RunConfig] = replace(configs[RunConfig], trained_as=label)
    return list(configs.values())


def preset_of(what: str, asked: str, method: str | None, metadata: Metadata, trained: GTRConfig | FlowConfig
              ) -> str:
    """The name of the preset that has a training step's settings, sizes aside; `custom` if none has."""
    # Where two presets come to the same settings, the name is that of the one that was asked for.
    for preset in (asked, *PRESETS):
        base = experiment(what, preset, method)
        if all(getattr(config, setting.name) == getattr(_part(base, type(config)), setting.name)
               for config in (metadata, trained) for setting in _flags(config)
               if not (setting.metadata["size"] or setting.metadata["path"])):
            return preset
    return "custom"


def _part(experiment_: Experiment, kind: type[Config]) -> Any:
    """The settings of one kind: those in the field of Experiment that is annotated with this very class."""
    return next(getattr(experiment_, part.name) for part in fields(Experiment) if part.type is kind)


def _flags(config: Any) -> list[Field]:
    """The fields that are flags: those made by `setting`."""
    return [setting for setting in fields(config) if setting.metadata]


def _add_flag(group: argparse._ArgumentGroup, setting: Field, default: Any) -> None:
    # int of int, int | None and tuple[int, ...] alike.
    kind = (*typing.get_args(setting.type), setting.type)[0]
    kind = _boolean if kind is bool else os.path.expanduser if setting.metadata["path"] else kind
    choices = setting.metadata["choices"] or tuple(TABLES.get(setting.name, ())) or None
    # argparse formats its help with %.
    why = setting.metadata["why"].replace("%", "%%")
    if "default:" not in why and default not in (None, ()):
        why += " (default: %(default)s)"
    # What --help shows for a value is its kind, not the flag's name again.
    shown = {int: "N", float: "X", _boolean: "True|False", os.path.expanduser: "PATH"}.get(kind, "NAME")
    group.add_argument(*setting.metadata["flags"] or (f"--{setting.name}",), dest=setting.name, type=kind,
                       default=default, choices=choices, help=why,
                       nargs="+" if typing.get_origin(setting.type) is tuple else None,
                       metavar=None if choices and len(choices) < 8 else shown)


def _boolean(text: str) -> bool:
    # bool("False") is True, so that Python's own conversion does not do.
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected True or False")
    return text.lower() in ("true", "1")
