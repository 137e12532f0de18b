"""report.html, the page of a test to look through: its tables, and images with outlines and samples to sort.

It is a single file that refers to no other. Its text, style and script are in the template report_page.html;
here samples are drawn and become outlines and small pictures.
"""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
from matplotlib.colors import Colormap, LinearSegmentedColormap
from PIL import Image
from skimage.measure import find_contours

from fig.canvas import COLOURS, VARIANCE_MAX, Array, checked, evenly_spaced, marked_part
from fig.results import Report
from metrics.catalogue import better
from metrics.evaluation import draw, image_names, progress
from metrics.files import write_text

SHOWN = 8  # samples of each system on an image
LARGEST = 20_000_000  # bytes of a page, of which TEXT are kept for all but the images
TEXT = 500_000
PICTURE_SIDE = 256  # pixels; a larger image is shown smaller, its outlines stay exact
LEVELS = 33  # colours of a map; odd, so that one of them is no error
ERROR = LinearSegmentedColormap.from_list("error", (COLOURS[1], "black", COLOURS[0]))
CAPTIONS = {  # of a table, by the first word of its first cell
    "system": "Scores: mean, and standard deviation over seeds",
    "difference": "Differences, ours minus the other; in brackets, 95 % intervals over patients",
    "empty": "Empty masks",
    "parts": "Where GED comes from: twice the distance of samples from experts, minus the diversity of both"}


@torch.no_grad()
def write_report(folder: Path, systems: Sequence[Any], dataset: Any, report: Report, table: str,
                 device: torch.device | str = "cpu") -> None:
    """Write report.html: the tables, and samples of all systems on at most `--report_images` images.

    systems: as `models.systems.System`; dataset: the test images, as `metrics.evaluation.Images`; report: of
    results.json; table: of table.md. The images are evenly spaced over the last system's GED. Samples are
    drawn again as they were scored under the first seed; the first SHOWN are shown, the maps are of all.
    Where the page would be larger than LARGEST, fewer images are in it. Raises ValueError as `draw` and
    `checked` do."""
    sampling = report["sampling"]
    n, seed = max(sampling["samples"]), sampling["seeds"][0]
    ged = np.mean(report["systems"][systems[-1].label]["scores"][f"GED{n}"], axis=0)
    # From the worst image to the best, so that the page shows the whole range.
    ranked = np.argsort(-ged, kind="stable")
    chosen = ranked[evenly_spaced(len(ranked), sampling["report_images"])].tolist()
    items, names = [], image_names(dataset)
    for index in progress(chosen, "report.html"):
        image, masks = (array.to(device)[None] for array in dataset[index])
        # Same seed and name as in the test, so these are the masks that were scored.
        samples = [draw(system.sample, image, n, seed, names[index])[0] for system in systems]
        item = {"id": names[index], "patient": report["groups"][index],
                "scores": [_scores(report, system.label, index) for system in systems]}
        item |= image_item(image[0], masks[0], torch.stack([of_system[:SHOWN] for of_system in samples]),
                           torch.stack([of_system.float().mean(0) for of_system in samples]))
        # An id such as </script> must not end the page's script, and NaN is no JSON.
        items.append(htmlsafe_json_dumps(item, allow_nan=False))
    write_text(folder / "report.html", page(report, systems, table, items, len(ranked)))


def _scores(report: Report, label: str, index: int) -> list[float]:
    """A system's scores on an image, means over seeds, in the order of results.json."""
    scores = report["systems"][label]["scores"].values()
    return [round(sum(run[index] for run in runs) / len(runs), 4) for runs in scores]


def image_item(image: Array, masks: Array, samples: Array, means: Array) -> dict[str, Any]:
    """What the page shows of an image (c, h, w) with masks (k, h, w) and samples (systems, m, h, w) of 0/1.

    means (systems, h, w): of all samples, m or more; error is theirs minus the experts' mean. box: the part
    of the image that holds all outlines."""
    image, masks, samples, means = checked(image=(image, "c h w"), masks=(masks, "k h w"),
                                           samples=(samples, "s m h w"), means=(means, "s h w"))
    experts = masks.mean(0)
    left, top, width, height = marked_part(masks, *samples)
    return {
        "picture": _picture(image), "size": masks.shape[:0:-1],
        "box": [round(value, 2) for value in (left + 0.5, top + 0.5, width, height)],
        "experts": [[int(mask.sum()), outline(mask)] for mask in masks],
        "variance": _variance(experts),
        "systems": [{"samples": [[int(mask.sum()), outline(mask)] for mask in of_system],
                     "variance": _variance(mean), "error": _map((mean - experts + 1) / 2, ERROR)}
                    for of_system, mean in zip(samples, means)],
    }


def outline(mask: np.ndarray) -> str:
    """The border of a mask (h, w) as an SVG path in half pixels from the image's corner, "" without one."""
    path = ""
    for contour in find_contours(np.pad(mask, 1), 0.5):
        # At level 0.5 a binary mask's contour runs through half pixels: twice as large, they are integers.
        points = np.rint(2 * contour[:, ::-1] - 1).astype(int)  # x, y; the ring of zeros is taken off
        steps = np.diff(points, axis=0)
        # A straight stretch of border is a single move, which keeps the page small.
        turns = [0, *(1 + np.flatnonzero((steps[1:] != steps[:-1]).any(1))), len(steps)]
        moves = np.diff(points[turns], axis=0).ravel().tolist()
        # The last move is left out: z closes the path.
        path += f"M{points[0, 0]} {points[0, 1]}l{' '.join(map(str, moves[:-2]))}z".replace(" -", "-")
    return path


def _picture(image: np.ndarray) -> str:
    """An image (c, h, w) in [0, 1] as a data URI: RGB as JPEG, else its first channel as grey PNG."""
    pixels = np.rint(255 * image.clip(0, 1)).astype(np.uint8)
    drawn = Image.fromarray(pixels.transpose(1, 2, 0) if len(pixels) == 3 else pixels[0])
    drawn.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    return _data_uri(drawn, "jpeg" if len(pixels) == 3 else "png")


def _variance(mean: np.ndarray) -> str:
    """A map of the variance of binary masks with this mean."""
    return _map(mean * (1 - mean) / VARIANCE_MAX, matplotlib.colormaps["magma"])


def _map(values: np.ndarray, colours: Colormap) -> str:
    """Values (h, w) in [0, 1] as the data URI of a PNG with a palette of LEVELS colours."""
    drawn = Image.fromarray(np.rint((LEVELS - 1) * values).astype(np.uint8))
    drawn.putpalette(colours(np.linspace(0, 1, LEVELS), bytes=True)[:, :3].tobytes())
    return _data_uri(drawn, "png")


def _data_uri(drawn: Image.Image, kind: str) -> str:
    file = io.BytesIO()
    drawn.save(file, kind, **({"quality": 88} if kind == "jpeg" else {"optimize": True}))
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def page(report: Report, systems: Sequence[Any], table: str, items: Sequence[str], count: int) -> str:
    """The page's text, of as many of the items as keep it smaller than LARGEST.

    items: what is shown of each image, by `htmlsafe_json_dumps`; count: how many test images there are. The
    other arguments are those of `write_report`."""
    # A tenth fewer at a time: which images are evenly spaced depends on how many they are.
    kept = len(items)
    while sum(len(items[i]) for i in evenly_spaced(len(items), kept)) > LARGEST - TEXT:
        kept = kept * 9 // 10
    sampling, names = report["sampling"], list(report["systems"][systems[0].label]["scores"])
    # The colour bars: maps of a single row.
    ramp = np.linspace(0, 1, 4 * LEVELS)[None]
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True,
                              undefined=StrictUndefined)  # a misspelt name is an error, not an empty text
    return environment.get_template("report_page.html").render(
        report=report, systems=systems, tables=tables_of(table), shown=SHOWN, largest=LARGEST // 10**6,
        n=max(sampling["samples"]), seed=sampling["seeds"][0], kept=kept, left_out=len(items) - kept,
        count=count, variance=_map(ramp, matplotlib.colormaps["magma"]), error=_map(ramp, ERROR),
        scores=names, colours=COLOURS, images=[items[i] for i in evenly_spaced(len(items), kept)],
        better=list(map(better, names)))


def tables_of(markdown: str) -> list[dict[str, Any]]:
    """Tables of markdown, an empty line between them, as caption, head and rows; lines as their text."""
    tables: list[dict[str, Any]] = []
    for table in markdown.strip().split("\n\n"):
        if not table.startswith("|"):
            tables.append({"text": table})
            continue
        # The second line of a table has only dashes.
        head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")]
                          for line in table.splitlines())
        tables.append({"caption": CAPTIONS.get(head[0].split()[0], head[0]), "head": head, "rows": rows})
    return tables
