"""README's pictures from real runs: python -m fig.draw main|pred|pred1

Only this module of `fig` loads models and data. It imports what takes seconds where it is needed, so that
--help and a misspelt flag are answered at once.
"""

if not __package__:  # started by its path, it would not find the project
    raise SystemExit("error: start it from the project's folder, as `python -m fig.draw ...`")


import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fig
from metadata_manager import EXPERIMENTS, FLOWS, PRESETS, Metadata, dataset, stage_folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from data import ExpertDataset
    from models import ATFM

SAMPLES = 16  # drawn per image
MIN_AREA = 0.01  # fraction of an image that each expert has to have marked, unless --image names it


def main_picture(flags: argparse.Namespace) -> "Figure":
    """The method on one test image: GTR's Gaussian, its samples, and how the first flows to a mask."""
    import torch

    from fig.canvas import evenly_spaced
    from fig.method import STATES

    atfm, image, masks, sample = load_run(flags, 1)
    if atfm.gtr is None:
        raise ValueError(f"--method {flags.method}: a flow without GTR, expected one whose x_0 is a sample "
                         "of GTR, such as atfm")
    if len(image) != 1:
        raise ValueError(f"--image: {len(image)} images, expected one for this picture")
    # The sampler itself is watched, so that the picture shows its states and not those of a second one.
    path: list[Tensor] = []  # x_t of all samples, as the sampler gives it to the network, then its end
    atfm.net.register_forward_pre_hook(lambda net, inputs: path.append(inputs[0][:, 0]))
    path.append(sample(solver="euler", batch_size=SAMPLES)[0])
    gaussian, shown = atfm.gtr(image), evenly_spaced(len(path), STATES)
    return fig.overview(image[0], masks[0], gaussian.mean[0], gaussian.cov_factor[0], path[0],
                        torch.stack([path[i][0] for i in shown]),
                        [round(i / (len(path) - 1), 2) for i in shown], path[-1] >= 0.5)


def prediction_picture(flags: argparse.Namespace) -> "Figure":
    """Samples beside the experts' masks, a row per test image."""
    atfm, images, masks, sample = load_run(flags, 4)
    return fig.prediction_grid(images, masks, sample(solver=atfm.objective.solver) >= 0.5)


def load_run(flags: argparse.Namespace, n: int) -> "tuple[ATFM, Tensor, Tensor, Callable[..., Tensor]]":
    """A run's best flow, test images (m, c, h, w), their masks (m, k, h, w) and the flow's sampler of them.

    The images are those of --image, or the n most disputed. Raises ValueError for one that is not there."""
    import torch

    from data import load
    from fig.pictures import to_draw
    from models import checkpoint, load_flow, load_gtr
    from models.processes import device_of

    folder, device = stage_folder(flags.method, flags.preset), device_of(flags.device)
    path = flags.run / folder / "best.pt"
    # The checkpoint says what it was trained on, so that no flag has to repeat it.
    trained = checkpoint.load(path, flags.method)["config"]
    metadata = Metadata(**{field.name: trained[field.name] for field in fields(Metadata)
                           if field.name in trained})
    named = metadata.what in EXPERIMENTS  # else a user's file
    path_now = dataset(metadata.what).data_path if named else metadata.data_path
    metadata = replace(metadata, data_path=flags.data_path or path_now)
    gtr = partial(load_gtr, flags.run / stage_folder("GTR", flags.preset) / "best.pt", metadata)
    atfm = load_flow(path, flags.method, gtr, metadata).to(device)
    test = load(metadata, "test")
    for index in flags.image:
        if not 0 <= index < len(test):
            raise ValueError(f"--image {index}: {metadata.what} has test images 0 to {len(test) - 1}")
    chosen = flags.image or most_disputed(test, n)
    print("test images " + ", ".join(f"{index} ({test.ids[index]})" for index in chosen))
    images, masks = to_draw(test, chosen, device)
    generator = torch.Generator(device).manual_seed(0)
    # With a fixed seed, the same command draws the same picture.
    return atfm, images, masks, partial(atfm.sample, images, SAMPLES, atfm.objective.steps,
                                        generator=generator)


def most_disputed(test: "ExpertDataset", n: int) -> list[int]:
    """The n images on whose masks the experts differ most, by the mean of 1 - IoU over pairs.

    They are of n patients, and each expert marked MIN_AREA of them or more. Raises ValueError if there are
    fewer."""
    from metrics import diversity

    # Without the least area the slices where an expert's mask is empty would win: nothing to look at.
    disputes: list[tuple[float, int]] = []
    for index in range(len(test)):
        _, masks = test[index]
        if (masks.mean((1, 2)) >= MIN_AREA).all():
            # Negative: the most disputed comes first and, of equals, the image with the smallest index.
            disputes.append((-float(diversity(masks[None].bool())), index))
    chosen: dict[Any, int] = {}
    for _, index in sorted(disputes):
        # The first of each patient: slices of the same nodule look alike.
        chosen.setdefault(test.patients[index], index)
    if len(chosen) < n:
        raise ValueError(f"{len(chosen)} patients have a test image of which each expert marked "
                         f"{MIN_AREA:.0%} or more, expected {n}; choose with --image")
    return list(chosen.values())[:n]


@dataclass(frozen=True)
class Picture:
    """How a picture is drawn, from a run on which data set unless --run names one, and what it shows."""

    draw: "Callable[[argparse.Namespace], Figure]"
    what: str
    shows: str


PICTURES = {
    "main": Picture(main_picture, "LIDC_demo", "the method on one test image, from GTR to masks"),
    "pred": Picture(prediction_picture, "LIDC_demo", "the first samples beside the experts' masks"),
    "pred1": Picture(prediction_picture, "isic3_demo", "the same of ISIC3"),
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags of a command line. Exits with a usage message for one that is misspelt."""
    parser = argparse.ArgumentParser(
        prog="python -m fig.draw", formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        description="Draw a picture of a run.",
        epilog="pictures:\n" + "\n".join(f"  {name:8}{picture.shows}" for name, picture in PICTURES.items()))
    parser.add_argument("picture", choices=PICTURES, metavar="picture", help="one of those below")
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="--output_path of the scripts (default: "
                        "runs/LIDC_demo; of pred1 runs/isic3_demo)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the picture, .png, .pdf or .svg; a file "
                        "that exists is kept (default: <run>/<picture>.png)")
    parser.add_argument("--data_path", metavar="PATH", help="folder or file of the data (default: as in "
                        "metadata_manager.PATHS)")
    parser.add_argument("--method", default="atfm", choices=FLOWS, metavar="NAME",
                        help=f"the flow: {', '.join(FLOWS)} (default: atfm)")
    parser.add_argument("--preset", default="paper", choices=PRESETS, help="that it was trained under "
                        "(default: paper)")
    parser.add_argument("--image", type=int, nargs="+", default=[], metavar="I",
                        help="images, by their place in the test split (default: those on which experts "
                        "differ most)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    flags = parser.parse_args(argv)
    flags.run = (flags.run or Path("runs", PICTURES[flags.picture].what)).expanduser()
    flags.output = (flags.output or flags.run / f"{flags.picture}.png").expanduser()
    return flags


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the picture that the command line names."""
    flags = parse(argv)
    # Imported late, as it brings torch: a misspelt flag is answered before.
    from metrics.program import one_line_errors

    with one_line_errors("fewer --image"):
        # Asked before sampling, which takes minutes.
        if flags.output.exists():
            raise ValueError(f"--output {flags.output}: exists and is kept; remove it, or name another file")
        fig.save(PICTURES[flags.picture].draw(flags), flags.output)
        print(flags.output)


if __name__ == "__main__":
    main()
