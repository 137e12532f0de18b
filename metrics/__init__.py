"""Scores of App. 7 on binary masks, others' scores used in the field, and their evaluation over a dataset."""

from metrics.evaluation import Evaluation, evaluate, interleaved, paired_bootstrap, score
from metrics.maps import calibration_error, dice_of_means, entropy_map, s_ncc, variance_map
from metrics.overlap import Overlaps, dice_matrix, iou_matrix
from metrics.scores import (
    d_max,
    diversity,
    diversity_from,
    ged,
    ged_from,
    hm_iou,
    hm_iou_from,
    mdm,
    mdm_from,
)

__all__ = [
    "Evaluation", "Overlaps", "calibration_error", "d_max", "dice_matrix", "dice_of_means", "diversity",
    "diversity_from", "entropy_map", "evaluate", "ged", "ged_from", "hm_iou", "hm_iou_from", "interleaved",
    "iou_matrix", "mdm", "mdm_from", "paired_bootstrap", "s_ncc", "score", "variance_map",
]
