"""Scores of binary masks, those of App. 7 and others of the field, and their evaluation over a dataset."""

from metrics.catalogue import SCORES, columns, score
from metrics.controls import control
from metrics.duration import workload
from metrics.evaluation import Evaluation, evaluate, image_names, image_seed, interleaved
from metrics.files import write_text
from metrics.folder import free_folder
from metrics.intervals import FEWEST_PATIENTS, bootstrap_interval, count_patients, two_level_interval
from metrics.maps import calibration_error, dice_of_means, s_ncc
from metrics.overlap import Overlaps, dice_matrix, iou_matrix
from metrics.provenance import commit, training_section
from metrics.record import Record, SystemRecord
from metrics.report import cost_table, differences_table, report_tables, results, scores_table
from metrics.scores import diversity, ged, ged_from, hm_iou, hm_iou_from, mdm, mdm_from
from metrics.systems import Row, evaluate_systems, identity_of

__all__ = [
    "FEWEST_PATIENTS", "SCORES", "Evaluation", "Overlaps", "Record", "Row", "SystemRecord",
    "bootstrap_interval", "calibration_error", "columns", "commit", "control", "cost_table",
    "count_patients", "dice_matrix", "dice_of_means", "differences_table", "diversity", "evaluate",
    "evaluate_systems", "free_folder", "ged", "ged_from", "hm_iou", "hm_iou_from", "identity_of",
    "image_names", "image_seed", "interleaved", "iou_matrix", "mdm", "mdm_from", "report_tables", "results",
    "s_ncc", "score", "scores_table", "training_section", "two_level_interval", "workload", "write_text",
]
