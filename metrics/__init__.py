"""Scores of App. 7 on binary masks, others' scores used in the field, and their evaluation over a dataset."""

from metrics.controls import control
from metrics.evaluation import Evaluation, evaluate, image_seed, interleaved, score
from metrics.maps import calibration_error, dice_of_means, entropy_map, s_ncc, variance_map
from metrics.overlap import Overlaps, dice_matrix, iou_matrix
from metrics.record import Record
from metrics.report import (
    Row,
    bootstrap_interval,
    cost_table,
    differences_table,
    free_folder,
    report_tables,
    results,
    scores_table,
    two_level_interval,
    workload,
    write_text,
)
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
    "Evaluation", "Overlaps", "Record", "Row", "bootstrap_interval", "calibration_error", "control",
    "cost_table", "d_max", "dice_matrix", "dice_of_means", "differences_table", "diversity", "diversity_from",
    "entropy_map", "evaluate", "free_folder", "ged", "ged_from", "hm_iou", "hm_iou_from", "image_seed",
    "interleaved", "iou_matrix", "mdm", "mdm_from", "report_tables", "results", "s_ncc", "score",
    "scores_table", "two_level_interval", "variance_map", "workload",
    "write_text",
]
