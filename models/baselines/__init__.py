"""The systems that ATFM is compared with, one file each: citation, loss, deviations from the original."""

from models.baselines.baseline import Baseline

BASELINES: dict[str, type[Baseline]] = {}

__all__ = ["BASELINES", "Baseline"]
