"""README's pictures from real runs.

python -m fig.draw main|pred|pred1|augmentation|curves|tradeoff|sweep [flags]

This module alone of `fig` loads models and data; what it draws with takes arrays.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

import data
import fig
from data import Slices
from data.augment import augment
from fig.canvas import evenly_spaced
from metadata_manager import FLOWS, METHODS, Metadata, PriorConfig, RunConfig, experiment
from metrics import diversity, variance_map
from models import ATFM, checkpoint, result_curves
from models.process import place
from models.stages import reports_errors
from models.systems import flow_sampler, load_atfm, load_gtr

SAMPLES = 16  # drawn per image
STATES = 5  # of the path in `main`
MIN_AREA = 0.01  # of an image that is drawn unless --image says otherwise, the least that each expert marked
SERIES = ("train/loss", "validation/GED", "validation/HM-IoU")
OVER_GTR = tuple(method for method in FLOWS if METHODS[method].get("source") != "normal")


@dataclass(frozen=True)
class Trained:
    """A run's flow, with what it was trained with and the device it is on."""

    atfm: ATFM
    prior: PriorConfig
    metadata: Metadata
    device: torch.device


def main_picture(flags: argparse.Namespace) -> Figure:
    """The method on one test image: GTR's Gaussian, its samples, and the way of the first to a mask."""
    trained = load_run(flags)
    image, masks = test_images(trained, flags.image, 1)
    steps = trained.prior.steps if flags.steps is None else flags.steps
    if steps < STATES - 1:
        raise ValueError(f"--steps {steps}: expected at least {STATES - 1}, for {STATES} states of the path")
    path = euler_path(trained.atfm, image, SAMPLES, steps,
                      torch.Generator(trained.device).manual_seed(flags.seed))
    assert trained.atfm.gtr is not None  # --method offers flows over GTR only
    with torch.no_grad():
        gaussian = trained.atfm.gtr(image)
    shown, masks_drawn = evenly_spaced(steps + 1, STATES), path[-1] >= 0.5
    return fig.overview(image[0], masks[0], gaussian.mean[0], gaussian.cov_factor[0], path[0],
                        path[shown, 0], [round(int(i) / steps, 2) for i in shown],
                        masks_drawn, variance_map(masks_drawn[None])[0])


def prediction_picture(flags: argparse.Namespace) -> Figure:
    """Samples beside the experts' masks, a row per test image."""
    trained = load_run(flags)
    image, masks = test_images(trained, flags.image, 4)
    steps = trained.prior.steps if flags.steps is None else flags.steps
    sample = flow_sampler(trained.atfm, steps, trained.prior.solver)
    samples = sample(image, SAMPLES, torch.Generator(trained.device).manual_seed(flags.seed)) >= 0.5
    return fig.prediction_grid(image, masks, samples)


def augmentation_picture(flags: argparse.Namespace) -> Figure:
    """Training images before and after augmentation, with the experts' contours."""
    metadata = experiment(flags.what).metadata
    train = data.load(replace(metadata, data_path=flags.data_path or metadata.data_path), "train")
    image, masks = train.batch(evenly_spaced(len(train), 6))
    torch.manual_seed(flags.seed)
    return fig.augmentation_sheet(image, masks, *augment(image, masks))


def curves_picture(flags: argparse.Namespace) -> Figure:
    """Training curves of every run below a folder."""
    run = run_folder(flags)
    folders = sorted({file.parent for file in run.rglob("events.out.tfevents.*")})
    if not folders:
        raise FileNotFoundError(f"{run}: found no TensorBoard log below it; "
                                "train first, or name another --run")
    found = {folder: fig.read_scalars(folder) for folder in folders}
    known = {name for series in found.values() for name in series}
    if not known.issuperset(flags.series):
        raise ValueError(f"--series {' '.join(flags.series)}: {run} has {', '.join(sorted(known))}")
    histories = {run.resolve().name if folder == run else str(folder.relative_to(run)):
                 {panel_name(wanted, folder): series[wanted] for wanted in flags.series if wanted in series}
                 for folder, series in found.items()}
    losses = {panel_name("train/loss", folder) for folder in found}
    return fig.learning_curves(histories, log_scale=losses)


def panel_name(series: str, folder: Path) -> str:
    """The panel of a run's series; validations of both stages share theirs.

    What is logged in training has one per stage: GTR's loss is another than the flows', thousands of times
    as large."""
    if not series.startswith("train/"):
        return series
    return f"{series}, {'GTR' if folder.name == 'GTR' else 'flow'}"


def tradeoff_picture(flags: argparse.Namespace) -> Figure:
    """GED and HM-IoU against network evaluations, of a test with several --steps or --solver."""
    return result_curves.tradeoff(result_curves.read_report(results_file(flags)))


def sweep_picture(flags: argparse.Namespace) -> Figure:
    """GED and HM-IoU against alpha, of a test with several --alphas."""
    return result_curves.sweep(result_curves.read_report(results_file(flags)))


def run_folder(flags: argparse.Namespace) -> Path:
    """The folder of --run, or where the training scripts write by default."""
    return Path(flags.run or Path("runs") / flags.what)


def results_file(flags: argparse.Namespace) -> Path:
    """The file of --results, or where the test scripts write by default."""
    return Path(flags.results or run_folder(flags) / "test" / "results.json")


def load_run(flags: argparse.Namespace) -> Trained:
    """The best flow of a run's folder over the run's GTR; its data is where --data_path or PATHS says."""
    run, device = run_folder(flags), place(RunConfig(device=flags.device))
    path = checkpoint.find(run / flags.method)
    config = checkpoint.load(path, flags.method)["config"]
    metadata = Metadata(**{field.name: config[field.name] for field in fields(Metadata)
                           if field.name in config})
    metadata = replace(metadata, data_path=flags.data_path or experiment(metadata.what).metadata.data_path)
    gtr = load_gtr(checkpoint.find(run / "GTR"), metadata)[0] if config["source"] == "gtr" else None
    atfm, prior, _ = load_atfm(path, flags.method, gtr)
    return Trained(atfm.to(device), prior, metadata, device)


def test_images(trained: Trained, wanted: Sequence[int], count: int) -> tuple[Tensor, Tensor]:
    """Test images (m, c, h, w) and masks (m, k, h, w).

    They are those of the indices `wanted`, or else the `count` most disputed.
    Raises ValueError for an index that the test split does not have."""
    test = data.load(trained.metadata, "test")
    for index in wanted:
        if not 0 <= index < len(test):
            raise ValueError(f"--image {index}: {trained.metadata.what} has test images 0 to {len(test) - 1}")
    chosen = list(wanted) or most_disputed(test, count)
    print("test images " + ", ".join(f"{index} ({test.ids[index]})" for index in chosen))
    return test.batch(chosen, trained.device)


def most_disputed(test: Slices, count: int) -> list[int]:
    """The images on whose masks the experts differ most, by the mean of 1 - IoU over pairs; one per patient.

    Only images of which each expert marked at least MIN_AREA, so that there is something to see.
    Raises ValueError if there are fewer than `count`."""
    parts = np.array_split(np.arange(len(test)), -(-len(test) // 256))  # 256 at a time bounds memory
    disputes = np.concatenate([_disputes(test.batch(part)[1]) for part in parts])
    chosen: dict[str, int] = {}
    for index in np.argsort(-disputes, kind="stable"):
        if disputes[index] >= 0:
            chosen.setdefault(str(test.groups[index]), int(index))
    if len(chosen) < count:
        raise ValueError(f"{len(chosen)} patients have a test image of which each expert marked "
                         f"{MIN_AREA:.0%} or more, expected {count}; choose with --image")
    return list(chosen.values())[:count]


def _disputes(masks: Tensor) -> np.ndarray:
    """Diversity of each image's masks (b, k, h, w): (b,), -1 where one of them is smaller than MIN_AREA."""
    marked = (masks.mean((2, 3)) >= MIN_AREA).all(1)
    return torch.where(marked, diversity(masks.bool()), -1.0).numpy()


def euler_path(atfm: ATFM, image: Tensor, n: int, steps: int, generator: torch.Generator) -> Tensor:
    """The states x_t of n samples of an image (1, c, h, w) at t = 0, 1 / steps, ..., 1: (steps + 1, n, h, w).

    The net is watched while `ATFM.sample` runs: these are the sampler's own states."""
    states: list[Tensor] = []
    hook = atfm.net.register_forward_pre_hook(lambda net, inputs: states.append(inputs[0][:, 0]))
    try:
        end = atfm.sample(image, n, steps, "euler", generator)[0]
    finally:
        hook.remove()
    return torch.stack([*states, end])


def parser() -> argparse.ArgumentParser:
    """A command per picture, each with its flags."""
    whole = argparse.ArgumentParser(prog="python -m fig.draw",
                                    description="Draw README's pictures from real runs.")
    commands = whole.add_subparsers(metavar="picture", required=True)
    for name, draw, what, methods in (("main", main_picture, "LIDC_demo", OVER_GTR),
                                      ("pred", prediction_picture, "LIDC_demo", FLOWS),
                                      ("pred1", prediction_picture, "isic3_demo", FLOWS)):
        command = _add_command(commands, name, draw, what)
        _add_run(command)
        _add_data(command)
        command.add_argument("--method", default="atfm", choices=methods, help="the flow")
        command.add_argument("--image", type=int, nargs=1 if name == "main" else "+", default=[],
                             help="index in the test split (default: what experts disagree on most)")
        command.add_argument("--steps", type=int, help="of the solver (default: the method's)")
        command.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    _add_data(_add_command(commands, "augmentation", augmentation_picture, "isic3_demo"))
    curves = _add_command(commands, "curves", curves_picture, "LIDC_demo")
    _add_run(curves)
    curves.add_argument("--series", nargs="+", default=SERIES,
                        help="names in TensorBoard's log, a panel each")
    for name, draw in (("tradeoff", tradeoff_picture), ("sweep", sweep_picture)):
        command = _add_command(commands, name, draw, "LIDC_demo")
        _add_run(command)
        command.add_argument("--results", help="results.json of a test (default: <run>/test/results.json)")
    return whole


def _add_command(commands: argparse._SubParsersAction, name: str, draw: object,
                 what: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=draw.__doc__, description=draw.__doc__,
                                  formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    command.set_defaults(draw=draw)
    command.add_argument("--what", default=what, help="name of the dataset")
    command.add_argument("--output", default=f"fig/{name}.png", help="the picture: .png, .pdf or .svg")
    return command


def _add_run(command: argparse.ArgumentParser) -> None:
    command.add_argument("--run", help="the experiment's folder, --output_path of training "
                                       "(default: runs/<what>)")


def _add_data(command: argparse.ArgumentParser) -> None:
    command.add_argument("--data_path", help="folder or file of the dataset "
                                             "(default: PATHS in metadata_manager.py)")
    command.add_argument("--seed", type=int, default=0, help="of what is drawn at random")


@reports_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Draws the picture that the command line names."""
    flags = parser().parse_args(argv)
    fig.save(flags.draw(flags), flags.output)
    print(flags.output)


if __name__ == "__main__":
    main()
