"""Pictures: from arrays, or from a system and a data set that are given, to figures and files."""

from fig.canvas import save
from fig.curves import Difference, Differences, differences, learning_curves, read_scalars
from fig.method import overview
from fig.own_images import draw_own_images
from fig.pictures import (
    augmentation_sheet,
    case_sheet,
    comparison,
    draw_comparison,
    draw_samples,
    prediction_grid,
    validation_picture,
    write_samples,
)
from fig.report_page import write_report
from fig.results import results_curves

__all__ = ["Difference", "Differences", "augmentation_sheet", "case_sheet", "comparison", "differences",
           "draw_comparison", "draw_own_images", "draw_samples", "learning_curves", "overview",
           "prediction_grid", "read_scalars", "results_curves", "save", "validation_picture", "write_report",
           "write_samples"]
