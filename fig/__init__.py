"""Pictures: functions from arrays to figures.

They load no model and no data set, so that a test or a training loop calls them with the arrays it has."""

from fig.canvas import figure_to_array, save
from fig.curves import (
    Difference,
    Differences,
    Panels,
    Points,
    differences,
    learning_curves,
    read_scalars,
    sweep,
    tradeoff,
)
from fig.method import overview
from fig.pictures import (
    augmentation_sheet,
    prediction_grid,
    samples_picture,
    validation_picture,
    variance_and_entropy,
)

__all__ = [
    "Difference", "Differences", "Panels", "Points", "augmentation_sheet", "differences", "figure_to_array",
    "learning_curves", "overview", "prediction_grid", "read_scalars", "samples_picture", "save", "sweep",
    "tradeoff", "validation_picture", "variance_and_entropy",
]
