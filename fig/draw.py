"""README's pictures from real runs: python -m fig.draw main|pred|pred1|augmentation|curves|tradeoff|sweep

This module alone of `fig` loads models and data."""

if not __package__:  # started by its path, it would not find the project
    raise SystemExit("error: start it from the project's folder, as `python -m fig.draw ...`")


import argparse
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

import fig
from data import ExpertDataset, augment, load
from fig import results
from fig.canvas import evenly_spaced
from fig.method import STATES
from fig.pictures import to_draw
from metadata_manager import EXPERIMENTS, FLOWS, Metadata
from metrics import diversity
from models import ATFM, checkpoint, load_flow, load_gtr
from models.flags import experiment
from models.processes import device_of, one_line_errors

SAMPLES = 16  # drawn per image
MIN_AREA = 0.01  # of an image that is drawn unless --image says otherwise, the least that each expert marked


def main_picture(flags: argparse.Namespace) -> Figure:
    """The method on one test image: GTR's Gaussian, its samples, and the way of the first to a mask."""
    atfm, image, masks, sample = load_run(flags, 1)
    if atfm.gtr is None or len(image) != 1:
        raise ValueError(f"--method {flags.method}, {len(image)} images: expected a flow over GTR, one image")
    path: list[Tensor] = []  # x_t of all samples, as the sampler gives it to the network, then its end
    atfm.net.register_forward_pre_hook(lambda net, inputs: path.append(inputs[0][:, 0]))
    path.append(sample(solver="euler", batch_size=SAMPLES)[0])
    gaussian, shown = atfm.gtr(image), evenly_spaced(len(path), STATES)
    return fig.overview(image[0], masks[0], gaussian.mean[0], gaussian.cov_factor[0], path[0],
                        torch.stack([path[i][0] for i in shown]),
                        [round(i / (len(path) - 1), 2) for i in shown], path[-1] >= 0.5)


def prediction_picture(flags: argparse.Namespace) -> Figure:
    """Samples beside the experts' masks, a row per test image."""
    atfm, images, masks, sample = load_run(flags, 4)
    return fig.prediction_grid(images, masks, sample(solver=atfm.objective.solver) >= 0.5)


def augmentation_picture(flags: argparse.Namespace) -> Figure:
    """Training images before and after augmentation, with the experts' contours."""
    metadata = experiment(flags.what).metadata
    train = load(replace(metadata, data_path=flags.data_path or metadata.data_path), "train")
    images, masks = to_draw(train, evenly_spaced(len(train), 6))
    torch.manual_seed(flags.seed)
    return fig.augmentation_sheet(images, masks, *augment(images, masks))


def curves_picture(flags: argparse.Namespace) -> Figure:
    """Training curves of every run below a folder."""
    panels: dict[str, dict[str, Any]] = {
        "train/loss, GTR": {}, "train/loss, flow": {}, "validation/GED": {}, "validation/HM-IoU": {}}
    for folder in sorted({file.parent for file in flags.run.rglob("events.out.tfevents.*")}):
        name = flags.run.resolve().name if folder == flags.run else str(folder.relative_to(flags.run))
        for series, points in fig.read_scalars(folder).items():
            if series == "train/loss":  # GTR's is another than the flows', thousands of times as large
                series += ", GTR" if folder.name == "GTR" else ", flow"
            if series in panels:
                panels[series][name] = points
    if not any(panels.values()):
        raise ValueError(f"{flags.run}: found no TensorBoard log below it; train, or name another --run")
    return fig.learning_curves({title: histories for title, histories in panels.items() if histories})


def results_picture(flags: argparse.Namespace) -> Figure:
    """GED and HM-IoU against network evaluations or alpha, of a run's test."""
    report = results.read_report(flags.run / "test" / "results.json")
    return results.tradeoff(report) if flags.picture == "tradeoff" else results.sweep(report)


def load_run(flags: argparse.Namespace, count: int) -> tuple[ATFM, Tensor, Tensor, Callable[..., Tensor]]:
    """A run's best flow, test images (m, c, h, w), their masks (m, k, h, w) and the flow's sampler of them.

    The images: --image, or the `count` most disputed. Raises ValueError for one that is not there."""
    path, device = flags.run / flags.method / "best.pt", device_of(flags.device)
    trained = checkpoint.load(path, flags.method)["config"]
    metadata = Metadata(**{one.name: trained[one.name] for one in fields(Metadata) if one.name in trained})
    known = metadata.what in EXPERIMENTS  # else a file of the user's own
    path_now = experiment(metadata.what).metadata.data_path if known else metadata.data_path
    metadata = replace(metadata, data_path=flags.data_path or path_now)
    gtr = partial(load_gtr, flags.run / "GTR" / "best.pt", metadata)
    atfm = load_flow(path, flags.method, gtr, metadata).to(device)
    test = load(metadata, "test")
    for index in flags.image:
        if not 0 <= index < len(test):
            raise ValueError(f"--image {index}: {metadata.what} has test images 0 to {len(test) - 1}")
    chosen = flags.image or most_disputed(test, count)
    print("test images " + ", ".join(f"{index} ({test.ids[index]})" for index in chosen))
    images, masks = to_draw(test, chosen, device)
    steps = atfm.objective.steps if flags.steps is None else flags.steps
    generator = torch.Generator(device).manual_seed(flags.seed)
    return atfm, images, masks, partial(atfm.sample, images, SAMPLES, steps, generator=generator)


def most_disputed(test: ExpertDataset, count: int) -> list[int]:
    """The images on whose masks the experts differ most, by the mean of 1 - IoU over pairs; one per patient.

    Each expert marked MIN_AREA of them or more. Raises ValueError if there are fewer than `count`."""
    disputes: list[tuple[float, int]] = []
    for index in range(len(test)):
        _, masks = test[index]
        if (masks.mean((1, 2)) >= MIN_AREA).all():
            disputes.append((-float(diversity(masks[None].bool())), index))
    chosen: dict[Any, int] = {}
    for _, index in sorted(disputes):
        chosen.setdefault(test.patients[index], index)
    if len(chosen) < count:
        raise ValueError(f"{len(chosen)} patients have a test image of which each expert marked "
                         f"{MIN_AREA:.0%} or more, expected {count}; choose with --image")
    return list(chosen.values())[:count]


PICTURES = {"main": main_picture, "pred": prediction_picture, "pred1": prediction_picture,
            "augmentation": augmentation_picture, "curves": curves_picture, "tradeoff": results_picture,
            "sweep": results_picture}


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the picture that the command line names; each heeds the flags that concern it."""
    parser = argparse.ArgumentParser(prog="python -m fig.draw", description="Draw README's pictures.")
    parser.add_argument("picture", choices=PICTURES)
    parser.add_argument("--what", help="data set (default: LIDC_demo; pred1, augmentation: isic3_demo)")
    parser.add_argument("--run", type=Path, help="--output_path of the scripts (default: runs/<what>)")
    parser.add_argument("--output", help="the picture, .png, .pdf or .svg (default: fig/<picture>.png)")
    parser.add_argument("--data_path", help="folder or file of the data (default: metadata_manager.PATHS)")
    parser.add_argument("--method", default="atfm", choices=FLOWS, help="the flow in main, pred, pred1")
    parser.add_argument("--image", type=int, nargs="+", default=[],
                        help="indices in the test split (default: where experts disagree most)")
    parser.add_argument("--steps", type=int, help="of the solver (default: the method's)")
    parser.add_argument("--seed", type=int, default=0, help="of samples and augmentation")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    flags = parser.parse_args(argv)
    flags.what = flags.what or ("isic3_demo" if flags.picture in ("pred1", "augmentation") else "LIDC_demo")
    output = flags.output or f"fig/{flags.picture}.png"
    with one_line_errors("a smaller picture"):
        flags.run = flags.run or Path(experiment(flags.what).run.output_path or "")
        fig.save(PICTURES[flags.picture](flags), output)
    print(output)


if __name__ == "__main__":
    main()
