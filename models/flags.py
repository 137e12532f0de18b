"""Command-line flags: every setting of metadata_manager's dataclasses is one.

Defaults < preset < method < flags. The defaults depend on three of the flags (--what, --preset, --method),
which are therefore read first.
"""

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
    Experiment,
    FlowConfig,
    GTRConfig,
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

# Settings whose choices are the entries of a table: who adds an entry has added the choice.
TABLES: dict[str, Mapping[str, Any]] = {
    "source": SOURCES, "backbone": BACKBONES, "network": NETWORKS, "solver": SOLVERS}
TITLES = {"RunConfig": "every script", "Metadata": "data", "GTRConfig": "step 1, GTR",
          "LoopConfig": "training loop", "FlowConfig": "step 2, the flow", "EvaluationConfig": "test"}


def experiment(what: str, preset: str = "paper", method: str | None = None) -> Experiment:
    """The settings of a data set under a preset and a method.

    what: a name in EXPERIMENTS, or an .h5 or .hdf5 file of `data.prepare`. method: one of METHODS, whose
    changes come last; a baseline has its paper's settings at full size, and the sizes of the flow in what is
    `small`. Act. GTR and its control change nothing. Raises ValueError, naming the flag, for another name."""
    if what not in EXPERIMENTS and what.lower().endswith((".h5", ".hdf5")):
        base = _from_file(Path(what).expanduser())
    else:
        metadata = dataset(what)
        base = replace(EXPERIMENTS[what], metadata=metadata,
                       run=replace(EXPERIMENTS[what].run, output_path=f"runs/{what}"))
    if preset not in PRESETS:
        raise ValueError(f"--preset {preset}: unknown; expected one of {', '.join(PRESETS)}")
    chosen = {"paper": lambda base: base, "released": released, "best": best}[preset](base)
    chosen = replace(chosen, run=replace(chosen.run, preset=preset))
    if method in BASELINES:  # which take from ATFM's flow only its sizes, in what is `small`
        recipe = ({name: getattr(base.flow, name) for name in ("batch_size", "lr", "ema", "dim")}
                  | {"experts": BASELINES[method].get("experts", "all")} if base.small else BASELINES[method])
        return replace(chosen, flow=FlowConfig(method=method, num_epochs=base.flow.num_epochs, **recipe))
    if method not in FLOWS:
        return chosen
    changes = FLOWS[method] | chosen.methods.get(method, {})
    return replace(chosen, flow=replace(chosen.flow, method=method, **changes))


def came_split(folds: set[str]) -> bool:
    """Whether images came split, by what their ids begin with: train and test, perhaps val, nothing else."""
    return {"train", "test"} <= folds <= {"train", "val", "test"}


def _from_file(path: Path) -> Experiment:
    """The settings for a file of `data.prepare`; raises ValueError, naming --what, for one that is not.

    Up to 128 x 128 pixels they are LIDC's, above ISIC3's, but without augmentation and at LIDC's width of
    ST-Net."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            # Grey images have no axis of channels.
            _, h, w, c = (*file["images"].shape, 1)[:4]
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

    what: the dataset without --what. Exits with a usage message for a flag that is misspelt or whose value is
    not of its kind, as argparse does; raises ValueError for one that is out of range or needs another."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--what", default=what)
    first.add_argument("--preset", default="paper")
    first.add_argument("--method", default=None)
    chosen, _ = first.parse_known_args(argv)

    parser = argparse.ArgumentParser(description=description.split("\n\n")[0], allow_abbrev=False,
                                     formatter_class=_Help)
    try:
        base = experiment(chosen.what, chosen.preset, chosen.method)
    except ValueError as error:
        parser.error(str(error))
    parser.add_argument("--what", default=what, help=f"name of the dataset: {', '.join(EXPERIMENTS)}; or an "
                                                      ".h5 file of your own, see data/prepare.py")
    defaults = [_part(base, kind) for kind in kinds]
    for config in defaults:
        group = parser.add_argument_group(TITLES[type(config).__name__])
        for setting in _flags(config):
            _add_flag(group, setting, getattr(config, setting.name))
    given = parser.parse_args(argv)
    configs = [replace(config, **{setting.name: getattr(given, setting.name) for setting in _flags(config)})
               for config in defaults]
    if getattr(given, "channels_last", False) and not given.compile:
        raise ValueError("--channels_last True needs --compile True: uncompiled, each GroupNorm on CUDA "
                         "changes the layout back and each convolution forth; pass both, or neither")
    # A testing script trains nothing; for a training script, which preset its settings are those of.
    trained = next((config for config in configs if isinstance(config, GTRConfig | FlowConfig)), None)
    if trained is None:
        return configs
    data = next((config for config in configs if isinstance(config, Metadata)), base.metadata)
    label = preset_of(chosen.what, chosen.preset, chosen.method, data, trained)
    return [replace(config, trained_as=label) if isinstance(config, RunConfig) else config
            for config in configs]


def preset_of(what: str, asked: str, method: str | None, metadata: Metadata, trained: GTRConfig | FlowConfig
              ) -> str:
    """The preset that the settings of a training step are those of, up to sizes: the one that was asked for,
    another, or `custom` if there is none."""
    for preset in (asked, *PRESETS):
        base = experiment(what, preset, method)
        if all(getattr(config, setting.name) == getattr(_part(base, type(config)), setting.name)
               for config in (metadata, trained) for setting in _flags(config) if not _is_free(setting)):
            return preset
    return "custom"


def _is_free(setting: Field) -> bool:
    """Whether another value of a setting is still the same method."""
    return setting.metadata["size"] or setting.metadata["path"]


def _part(experiment_: Experiment, kind: type[Config]) -> Any:
    """The settings of one kind: those in the field of Experiment that is annotated with this very class."""
    return next(getattr(experiment_, part.name) for part in fields(Experiment) if part.type is kind)


def _flags(config: Any) -> list[Field]:
    """The fields that are flags: those made by `setting`."""
    return [setting for setting in fields(config) if setting.metadata]


def _add_flag(group: argparse._ArgumentGroup, setting: Field, default: Any) -> None:
    kind = (*typing.get_args(setting.type), setting.type)[0]  # int of int, int | None and tuple[int, ...]
    several: dict[str, Any] = ({"nargs": "+", "action": _Tuple} if typing.get_origin(setting.type) is tuple
                               else {})
    kind = _boolean if kind is bool else os.path.expanduser if setting.metadata["path"] else kind
    choices = setting.metadata["choices"] or tuple(TABLES.get(setting.name, ())) or None
    names = setting.metadata["flags"] or (f"--{setting.name}",)
    help_ = setting.metadata["why"].replace("%", "%%")  # argparse formats its help with %
    group.add_argument(*names, dest=setting.name, default=default, type=kind, choices=choices, help=help_,
                       metavar=None if choices and len(choices) < 8 else _placeholder(kind), **several)


def _placeholder(kind: Any) -> str:
    """What --help shows for a value: its kind, not the flag's name again."""
    return {int: "N", float: "X", _boolean: "True|False", os.path.expanduser: "PATH"}.get(kind, "NAME")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default of a flag, unless its text gives one in words."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.help and ("default:" in action.help or action.default in (None, ())):
            return action.help
        return super()._get_help_string(action)


class _Tuple(argparse.Action):
    """Stores the values of a flag as a tuple, like the default."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, tuple(values))


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected True or False")
    return text.lower() in ("true", "1")
