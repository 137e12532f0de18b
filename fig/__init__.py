"""Pictures: from arrays, or from a system and a data set that are given, to figures and files."""

import os
import sys
from importlib import import_module
from typing import Any

# A notebook leaves its backend to the shell, where it may not be installed. This stands here, as TensorBoard
# imports matplotlib too, which looks for the backend at once.
if "IPython" not in sys.modules:
    os.environ.pop("MPLBACKEND", None)

PLACES = {
    "fig.canvas": ("save",),
    "fig.method": ("overview",),
    "fig.own_images": ("draw_own_images",),
    "fig.pictures": ("case_sheet", "comparison", "draw_comparison", "draw_samples", "prediction_grid",
                     "validation_picture", "write_samples"),
    "fig.report_page": ("write_report",),
    "fig.results": ("results_curves",),
}
__all__ = sorted(name for names in PLACES.values() for name in names)


def __getattr__(name: str) -> Any:
    """Imports a function where it is first used: torch takes seconds, for which --help should not wait."""
    for module, names in PLACES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'fig' has no attribute {name!r}")
