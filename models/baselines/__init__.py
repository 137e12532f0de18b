"""The systems that the papers compare with, a file each: its first lines are citation, loss, deviations."""

from dataclasses import fields
from pkgutil import resolve_name

from metadata_manager import BASELINES, FlowConfig
from models.baselines.baseline import Baseline

# metadata_manager has the names as text only, because it imports nothing of this project.
CLASSES: dict[str, type[Baseline]] = {
    method: resolve_name(f"models.baselines.{name}") for method, (name, _) in BASELINES.items()}


def baseline(method: str, channels: int, config: FlowConfig) -> Baseline:
    """An untrained system for images of `channels` channels.

    Raises ValueError, naming the flag, for a setting that it does not have."""
    kind = CLASSES[method]
    for setting in fields(FlowConfig):
        value = getattr(config, setting.name)
        # A flag that does nothing would leave someone believing that it did. "False" is --amp's, which is
        # allowed because these systems compute in float32 anyway.
        if setting.name not in kind.settings and value != setting.default and value != "False":
            flag = (setting.metadata["flags"] or (f"--{setting.name}",))[-1]
            raise ValueError(f"{flag} {value}: {method} has no such part; leave it out")
    return kind(channels, config)


__all__ = ["CLASSES", "Baseline", "baseline"]
