"""The systems that the papers compare with, on shared parts, one file each: citation, loss, deviations."""

from metadata_manager import FlowConfig
from models.baselines.analog_bits import AnalogBits
from models.baselines.baseline import Baseline
from models.baselines.ccdm import CCDM
from models.baselines.cimd import CIMD
from models.baselines.conditioned import ConditionedProbUNet, ConditionedSSN
from models.baselines.flow_ssn import FlowSSN
from models.baselines.mose import MoSE
from models.baselines.phiseg import PHiSeg
from models.baselines.prob_unet import ProbUNet
from models.baselines.ssn import SSN

BASELINES: dict[str, type[Baseline]] = {
    "ssn": SSN, "prob-unet": ProbUNet, "phiseg": PHiSeg, "mose": MoSE, "ccdm": CCDM, "ab": AnalogBits,
    "cimd": CIMD, "flow-ssn": FlowSSN, "c-ssn": ConditionedSSN, "c-prob-unet": ConditionedProbUNet}


def baseline(method: str, channels: int, config: FlowConfig) -> Baseline:
    """An untrained system for images of `channels` channels.

    Raises ValueError for settings that only ATFM's flows have."""
    for name in ("amp", "channels_last", "compile", "images_per_pass"):
        if getattr(config, name):
            raise ValueError(f"--{name} {getattr(config, name)}: only flows of ATFM have it; leave it out "
                             f"for --method {method}")
    return BASELINES[method](channels, config)


__all__ = ["BASELINES", "Baseline", "baseline"]
