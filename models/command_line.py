"""Flags generated from the dataclasses of metadata_manager: one per field, its help the field's reason."""

import argparse
import dataclasses
import typing
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from metadata_manager import METHODS, Experiment, RunConfig, experiment

MISSPELT = {"batchsize": ["--betchsize"]}  # accepted, not shown in --help
ALIASES = {"methods": ["--method"]}


@dataclass(frozen=True)
class Settings:
    """What a command line asks for."""

    run: RunConfig
    experiment: Experiment


def parse(argv: Sequence[str] | None, what: str, parts: Sequence[str], description: str) -> Settings:
    """Reads flags of RunConfig and of the named parts of Experiment; defaults < preset < method < flags.

    Exits with a usage message for a misspelt flag or a value of the wrong kind, as argparse does.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--what", default=what)
    first.add_argument("--preset", default=RunConfig.preset)
    first.add_argument("--method", default=None)
    chosen, _ = first.parse_known_args(argv)

    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    try:
        base = experiment(chosen.what, chosen.preset)
    except ValueError as error:
        parser.error(str(error))
    if "prior" in parts and chosen.method in METHODS:
        base = replace(base, prior=replace(base.prior, **METHODS[chosen.method]))

    parser.add_argument("--what", default=what, help="name of the dataset")
    groups: dict[str, Any] = {"run": RunConfig(), **{part: getattr(base, part) for part in parts}}
    for title, config in groups.items():
        group = parser.add_argument_group(title)
        for field in _flags(config):
            _add_flag(group, field, getattr(config, field.name))
    given = parser.parse_args(argv)
    changed = {title: replace(config, **{field.name: getattr(given, field.name) for field in _flags(config)})
               for title, config in groups.items()}
    return Settings(changed.pop("run"), replace(base, **changed))


def _flags(config: Any) -> list[dataclasses.Field]:
    """The fields that are flags: those with a reason."""
    return [field for field in dataclasses.fields(config) if field.metadata]


def _add_flag(group: argparse._ArgumentGroup, field: dataclasses.Field, default: Any) -> None:
    kind = (*typing.get_args(field.type), field.type)[0]  # int of int, int | None and tuple[int, ...]
    several = typing.get_origin(field.type) is tuple
    options: dict[str, Any] = {"dest": field.name, "type": _boolean if kind is bool else kind}
    options["choices"] = field.metadata["choices"] or None
    if several:
        options |= {"nargs": "+", "action": _Tuple}
    names = [f"--{field.name}", *ALIASES.get(field.name, [])]
    group.add_argument(*names, default=default, help=field.metadata["why"].replace("%", "%%"), **options)
    for name in MISSPELT.get(field.name, []):
        group.add_argument(name, default=argparse.SUPPRESS, help=argparse.SUPPRESS, **options)


class _Tuple(argparse.Action):
    """Stores the values of a flag as a tuple, like the default."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, tuple(values))


def _boolean(text: str) -> bool:
    if text not in ("True", "False", "true", "false", "1", "0"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected True or False")
    return text in ("True", "true", "1")
