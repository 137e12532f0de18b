"""The systems that the papers compare with, on shared parts; their `losses` and `sample` are used as ATFM's.

Where a class has `needs_style`, its `losses` takes the annotation style (b, k) of the masks as well."""

from models.baselines.conditioned import ConditionedProbUNet, ConditionedSSN
from models.baselines.mose import MoSE
from models.baselines.phiseg import PHiSeg
from models.baselines.prob_unet import ProbUNet
from models.baselines.ssn import SSN

BASELINES = {"ssn": SSN, "prob-unet": ProbUNet, "phiseg": PHiSeg, "mose": MoSE, "c-ssn": ConditionedSSN,
             "c-prob-unet": ConditionedProbUNet}

__all__ = ["BASELINES"]
