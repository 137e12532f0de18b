"""The systems that the papers compare with, on shared parts, one file each: citation, loss, deviations."""

from dataclasses import fields

from metadata_manager import FlowConfig
from models.baselines.analog_bits import AnalogBits
from models.baselines.baseline import Baseline
from models.baselines.ccdm import CCDM
from models.baselines.cimd import CIMD
from models.baselines.conditioned import ConditionedProbUNet, ConditionedSSN
from models.baselines.flow_ssn import FlowSSN
from models.baselines.mose import MoSE
from models.baselines.phiseg import PHiSeg
from models.baselines.prob_unet import EnergyProbUNet, ProbUNet
from models.baselines.ssn import SSN

CLASSES: dict[str, type[Baseline]] = {
    "ssn": SSN, "prob-unet": ProbUNet, "prob-unet-energy": EnergyProbUNet, "phiseg": PHiSeg, "mose": MoSE,
    "ccdm": CCDM, "ab": AnalogBits, "cimd": CIMD, "flow-ssn": FlowSSN, "c-ssn": ConditionedSSN,
    "c-prob-unet": ConditionedProbUNet}


def baseline(method: str, channels: int, config: FlowConfig) -> Baseline:
    """An untrained system for images of `channels` channels.

    Raises ValueError, naming the flag, for a setting that it does not have."""
    kind = CLASSES[method]
    for setting in fields(FlowConfig):
        value = getattr(config, setting.name)
        # "False" is of --amp: these systems are in float32 anyway.
        if setting.name not in kind.settings and value != setting.default and value != "False":
            flag = (setting.metadata["flags"] or (f"--{setting.name}",))[-1]
            raise ValueError(f"{flag} {value}: {method} has no such part; leave it out")
    return kind(channels, config)


__all__ = ["CLASSES", "Baseline", "baseline"]
