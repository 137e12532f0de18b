"""README's pictures from real runs: python -m fig.draw main|pred|pred1|augmentation|curves|tradeoff|sweep

This module alone of `fig` loads models and data. It imports what takes seconds where it is needed, so that
--help and a misspelt flag are answered at once.
"""

if not __package__:  # started by its path, it would not find the project
    raise SystemExit("error: start it from the project's folder, as `python -m fig.draw ...`")


import argparse
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fig
from metadata_manager import EXPERIMENTS, FLOWS, PRESETS, Metadata, experiment, stage_folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from data import ExpertDataset
    from models import ATFM

SAMPLES = 16  # drawn per image
MIN_AREA = 0.01  # of an image that is drawn unless --image says otherwise, the least that each expert marked
PROGRAM = "ATFM fig.draw"  # by which a picture's file says that it was made here


def main_picture(flags: argparse.Namespace) -> "Figure":
    """The method on one test image: GTR's Gaussian, its samples, and the way of the first to a mask."""
    import torch

    from fig.canvas import evenly_spaced
    from fig.method import STATES

    atfm, image, masks, sample = load_run(flags, 1)
    if atfm.gtr is None:
        raise ValueError(f"--method {flags.method}: found a flow without GTR, expected one whose x_0 is a "
                         "sample of GTR, such as atfm")
    if len(image) != 1:
        raise ValueError(f"--image: found {len(image)} images, expected one for this picture")
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


def augmentation_picture(flags: argparse.Namespace) -> "Figure":
    """Training images before and after augmentation, with the experts' contours."""
    import torch

    from data import augment, load
    from fig.canvas import evenly_spaced
    from fig.pictures import to_draw
    from models.flags import experiment

    metadata = experiment(flags.what).metadata
    train = load(replace(metadata, data_path=flags.data_path or metadata.data_path), "train")
    images, masks = to_draw(train, evenly_spaced(len(train), 6))
    torch.manual_seed(flags.seed)
    return fig.augmentation_sheet(images, masks, *augment(images, masks))


def curves_picture(flags: argparse.Namespace) -> "Figure":
    """Training curves of every run below a folder; the loss of each system has a panel of its own."""
    losses: dict[str, dict[str, Any]] = {}
    scores: dict[str, dict[str, Any]] = {"validation/GED": {}, "validation/HM-IoU": {}}
    for folder in sorted({file.parent for file in flags.run.rglob("events.out.tfevents.*")}):
        run = flags.run.resolve().name if folder == flags.run else str(folder.relative_to(flags.run))
        for series, points in fig.read_scalars(folder).items():
            if series == "train/loss":  # one system's is thousands of times another's
                losses.setdefault(f"{series}, {folder.resolve().name}", {})[run] = points
            elif series in scores:
                scores[series][run] = points
    panels = losses | {title: runs for title, runs in scores.items() if runs}
    if not panels:
        raise ValueError(f"--run {flags.run}: found no TensorBoard log below it; train, or name another")
    return fig.learning_curves(panels)


def tradeoff_picture(flags: argparse.Namespace) -> "Figure":
    """GED and HM-IoU of a run's test against NFE."""
    from fig import results

    return results.tradeoff(results.read_report(flags.run / "test" / "results.json"))


def sweep_picture(flags: argparse.Namespace) -> "Figure":
    """GED and HM-IoU of a run's test against alpha."""
    from fig import results

    return results.sweep(results.read_report(flags.run / "test" / "results.json"))


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
    trained = checkpoint.load(path, flags.method)["config"]
    metadata = Metadata(**{field.name: trained[field.name] for field in fields(Metadata)
                           if field.name in trained})
    named = metadata.what in EXPERIMENTS  # else a file of the user's own
    path_now = experiment(metadata.what).metadata.data_path if named else metadata.data_path
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
    steps = atfm.objective.steps if flags.steps is None else flags.steps
    generator = torch.Generator(device).manual_seed(flags.seed)
    return atfm, images, masks, partial(atfm.sample, images, SAMPLES, steps, generator=generator)


def most_disputed(test: "ExpertDataset", n: int) -> list[int]:
    """The n images on whose masks the experts differ most, by the mean of 1 - IoU over pairs.

    They are of n patients, and each expert marked MIN_AREA of them or more. Raises ValueError if there are
    fewer."""
    from metrics import diversity

    disputes: list[tuple[float, int]] = []
    for index in range(len(test)):
        _, masks = test[index]
        if (masks.mean((1, 2)) >= MIN_AREA).all():
            disputes.append((-float(diversity(masks[None].bool())), index))
    chosen: dict[Any, int] = {}
    for _, index in sorted(disputes):
        chosen.setdefault(test.patients[index], index)
    if len(chosen) < n:
        raise ValueError(f"{len(chosen)} patients have a test image of which each expert marked "
                         f"{MIN_AREA:.0%} or more, expected {n}; choose with --image")
    return list(chosen.values())[:n]


@dataclass(frozen=True)
class Picture:
    """How a picture is drawn, from which data set unless --what says otherwise, and what it shows."""

    draw: "Callable[[argparse.Namespace], Figure]"
    what: str
    shows: str


PICTURES = {
    "main": Picture(main_picture, "LIDC_demo", "the method on one test image, from GTR to masks"),
    "pred": Picture(prediction_picture, "LIDC_demo", "the first samples beside the experts' masks"),
    "pred1": Picture(prediction_picture, "isic3_demo", "the same of ISIC3"),
    "augmentation": Picture(augmentation_picture, "isic3_demo", "training images before and after it"),
    "curves": Picture(curves_picture, "LIDC_demo", "losses and validation scores during training"),
    "tradeoff": Picture(tradeoff_picture, "LIDC_demo", "a test's scores against NFE"),
    "sweep": Picture(sweep_picture, "LIDC_demo", "a test's scores against alpha"),
}


def place_of(output: Path, mark: str) -> Path:
    """Where a picture with this mark goes: `output`, or beside it, where another command made that one.

    Raises ValueError for a file that was not made here."""
    for number in count(1):
        path = output if number == 1 else output.with_stem(f"{output.stem}_{number}")
        if not path.exists():
            return path
        content = path.read_bytes()
        if mark.encode() in content:
            return path
        if PROGRAM.encode() not in content:
            raise ValueError(f"--output {path}: exists and was not made by this program, so it is kept; "
                             "remove it, or name another")
        print(f"{path}: kept, another command made it; this picture goes beside it")
    raise AssertionError("count does not end")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags of a command line. Exits with a usage message for one that is misspelt."""
    parser = argparse.ArgumentParser(
        prog="python -m fig.draw", formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        description="Draw a picture of a run, its test or its data.",
        epilog="pictures:\n" + "\n".join(f"  {name:14}{picture.shows}" for name, picture in PICTURES.items()))
    parser.add_argument("picture", choices=PICTURES, metavar="picture", help="one of those below")
    parser.add_argument("--what", metavar="NAME", help="data set, or an .h5 file of your own (default: "
                        "LIDC_demo; of pred1 and augmentation isic3_demo)")
    parser.add_argument("--run", metavar="FOLDER", help="--output_path of the scripts (default: runs/<what>)")
    parser.add_argument("--output", metavar="FILE", help="the picture, .png, .pdf or .svg (default: "
                        "<run>/<picture>.png); a file that another command made is kept")
    parser.add_argument("--data_path", metavar="PATH", help="folder or file of the data (default: as in "
                        "metadata_manager.PATHS)")
    parser.add_argument("--method", default="atfm", choices=FLOWS, metavar="NAME",
                        help=f"the flow in main, pred and pred1: {', '.join(FLOWS)} (default: atfm)")
    parser.add_argument("--preset", default="paper", choices=PRESETS, help="that it was trained under "
                        "(default: paper)")
    parser.add_argument("--image", type=int, nargs="+", default=[], metavar="I",
                        help="images in main, pred and pred1, by their place in the test split (default: "
                        "those on which experts differ most)")
    parser.add_argument("--steps", type=int, metavar="N", help="solver steps (default: the flow's)")
    parser.add_argument("--seed", type=int, default=0, metavar="N",
                        help="of samples and of augmentation (default: 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    return parser.parse_args(argv)


def complete(flags: argparse.Namespace) -> None:
    """Fill in defaults, and make paths of texts.

    Raises ValueError, naming the flag, for a number that is out of range."""
    if not 0 <= flags.seed < 2 ** 64:
        raise ValueError(f"--seed {flags.seed}: expected a whole number from 0 to {2 ** 64 - 1}")
    if flags.steps is not None and flags.steps < 1:
        raise ValueError(f"--steps {flags.steps}: expected a whole number of at least 1")
    flags.what = flags.what or PICTURES[flags.picture].what
    from models.flags import experiment

    default = experiment(flags.what).run.output_path  # also where --run is given: a misspelt --what is named
    flags.run = Path(flags.run or default or "runs").expanduser()
    flags.output = Path(flags.output or flags.run / f"{flags.picture}.png").expanduser()
    flags.data_path = flags.data_path and str(Path(flags.data_path).expanduser())


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the picture that the command line names; each heeds the flags that concern it."""
    flags = parse(argv)
    from metrics.program import one_line_errors

    with one_line_errors("a smaller --run or --data_path, or fewer --image"):
        complete(flags)
        asked = {name: str(value) for name, value in vars(flags).items() if name != "output"}
        mark = f"{PROGRAM} {hashlib.blake2b(repr(asked).encode(), digest_size=8).hexdigest()}"
        output = place_of(flags.output, mark)
        fig.save(PICTURES[flags.picture].draw(flags), output, mark)
        print(output)


if __name__ == "__main__":
    main()
