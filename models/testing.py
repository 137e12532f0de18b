"""Testing as the scripts call it: systems scored on held-out images, tables, results.json, pictures."""

import functools
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import fig
from data import Slices
from fig.canvas import whole_file
from metadata_manager import METHODS, Metadata, PriorConfig, Reported, SamplingConfig, reported
from metrics import Evaluation, evaluate, interleaved, paired_bootstrap
from models import ATFM, GTR, checkpoint, load_released
from models.atfm import ready
from models.command_line import Settings, parse
from models.own_images import draw_own_images
from models.parallel import Processes, joined
from models.process import place
from models.result_curves import matching_n, save_curves
from models.solvers import EVALUATIONS_PER_STEP
from models.stages import flow_folder, gtr_path, output, reports_errors
from models.systems import (
    Sampler,
    build_atfm,
    build_gtr,
    check_size,
    flow_sampler,
    gtr_sampler,
    load_atfm,
    load_gtr,
    versions,
)


@dataclass(frozen=True)
class System:
    """A row of the table: a trained system with its way of sampling; `evaluations` of the net per sample."""

    label: str
    method: str
    sample: Sampler
    evaluations: int
    checkpoints: tuple[str, ...]
    alpha: float | None = None  # of --alphas
    solver: str | None = None
    steps: int | None = None


@reports_errors
def test_prior(what: str, argv: Sequence[str] | None = None) -> None:
    """Scores each system on the test split into <output_path>/test: results.json, table.md, pictures.

    With --images draws samples for those instead, into <output_path>/images."""
    settings = parse(argv, what, ("metadata", "sampling"), "Test ATFM and what it is compared with.")
    metadata, config, device = settings.experiment.metadata, settings.experiment.sampling, place(settings.run)
    with joined(device) as processes:
        if config.images:
            if processes.first:
                draw_own_images(settings, systems(settings, metadata, (), device), device)
            return
        test = processes.first_first(lambda: data.load(metadata, "test"))
        rows = systems(settings, metadata, test.ids, device)
        results: dict[str, Evaluation] = {}
        seconds: dict[str, float] = {}
        for system in rows:
            started = time.perf_counter()
            results[system.label] = score_together(system, test, config, device, processes)
            seconds[system.label] = time.perf_counter() - started
    if processes.first:
        write_results(settings, test, rows, results, seconds, device)


def score_together(system: System, test: Slices, config: SamplingConfig, device: torch.device,
                   processes: Processes) -> Evaluation:
    """Scores of a system on all test images, of which each process draws and scores every m-th."""
    mine = test.rows[processes.rank::processes.count]
    silent = None if processes.first else True  # None: where nobody sees it
    progress = functools.partial(tqdm, desc=system.label, leave=False, disable=silent)
    found = None
    if len(mine):
        images = Slices(test.cache, mine, test.crop).to(device)
        found = evaluate(system.sample, images, config.samples, config.seeds, device, progress)
    return interleaved([part for part in processes.gather(found) if part is not None])


def write_results(settings: Settings, test: Slices, rows: Sequence[System], results: dict[str, Evaluation],
                  seconds: dict[str, float], device: torch.device) -> None:
    """Prints the tables, and writes them, results.json and the pictures into <output_path>/test."""
    config, folder = settings.experiment.sampling, output(settings) / "test"
    folder.mkdir(parents=True, exist_ok=True)
    table = scores_table(settings.experiment.metadata.what, rows, results, config.samples)
    if len(rows) > 1:
        table += "\n" + differences_table(rows, results, config.samples, test.groups)
    print(table)
    write(folder / "table.md", table)
    found = report(settings, test, rows, results, seconds, device)
    write(folder / "results.json", json.dumps(found))
    for system in rows:
        draw(system, test, config.seeds[0], folder, device)
    curves = save_curves(found, folder)
    print(f"{folder}: {', '.join(['table.md, results.json', *curves])} and pictures of each system's samples")


def systems(settings: Settings, metadata: Metadata, test_ids: Sequence[str],
            device: torch.device) -> list[System]:
    """The systems that the flags name, loaded.

    Raises ValueError if one was trained on test images or on images of another size, if any."""
    config = settings.experiment.sampling
    flows = [method for method in config.methods if method != "act-gtr"]
    if config.prior is not None and (len(flows) > 1 or config.alphas):
        raise ValueError(f"--prior names one flow, but --methods {' '.join(config.methods)} asks for "
                         f"{len(flows)}; leave --prior out, the folders of --output_path are taken")
    found: list[System] = []
    for method in config.methods:
        gtr, gtr_name = None, []
        if method == "act-gtr" or METHODS[method].get("source") != "normal":
            path = gtr_path(settings, config.gtr)
            gtr, gtr_name = trained_gtr(settings, path, test_ids).to(device), [str(path)]
        if gtr is not None and method == "act-gtr":
            found.append(System(method, method, gtr_sampler(gtr), 0, (*gtr_name,)))
            continue
        for alpha in config.alphas or (None,):
            path = checkpoint.find(config.prior or flow_folder(settings, method, alpha))
            atfm, trained = trained_flow(settings, path, method, gtr, test_ids)
            atfm.to(device).amp = config.amp
            net = ready(atfm.net, config.channels_last, config.compile)
            per_step = 1 if trained.guidance == 0 else 2
            solvers, steps_of_each = config.solver or (trained.solver,), config.steps or (trained.steps,)
            for solver, steps in product(solvers, steps_of_each):
                found.append(System(
                    label(method, config, alpha, solver, steps), method,
                    flow_sampler(atfm, steps, solver, config.batch_size, net),
                    steps * EVALUATIONS_PER_STEP[solver] * per_step, (*gtr_name, str(path)),
                    alpha, solver, steps))
    return found


def trained_gtr(settings: Settings, path: Path, test_ids: Sequence[str]) -> GTR:
    """GTR from our checkpoint, not trained on test images, or from the authors' with the preset's layout."""
    config, metadata = settings.experiment.sampling, settings.experiment.metadata
    if config.released_checkpoint:
        gtr = build_gtr(metadata, settings.experiment.gtr)
        load_released(gtr, checkpoint.state_dict(path))
        return gtr.eval()
    gtr, content = load_gtr(path, metadata)
    if test_ids:
        check_size(path, content, metadata)
    refuse_overlap(path, content["training_ids"], test_ids, config.allow_overlap)
    return gtr


def trained_flow(settings: Settings, path: Path, method: str, gtr: GTR | None,
                 test_ids: Sequence[str]) -> tuple[ATFM, PriorConfig]:
    """A flow and its settings, from our checkpoint, or from the authors' and the preset.

    Raises ValueError if it was trained on test images, as far as a checkpoint says."""
    config = settings.experiment.sampling
    if config.released_checkpoint:
        atfm = build_atfm(settings.experiment.prior, gtr)
        load_released(atfm.net, checkpoint.state_dict(path))
        return atfm.eval(), settings.experiment.prior
    atfm, trained, content = load_atfm(path, method, gtr)
    if test_ids:
        check_size(path, content, settings.experiment.metadata)
    refuse_overlap(path, content["training_ids"], test_ids, config.allow_overlap)
    return atfm, trained


def label(method: str, config: SamplingConfig, alpha: float | None, solver: str, steps: int) -> str:
    """The method, with the settings that vary between the rows."""
    varying = [f"alpha {alpha:g}"] if alpha is not None else []
    varying += [solver] if len(config.solver) > 1 else []
    varying += [f"{steps} steps"] if len(config.steps) > 1 else []
    return ", ".join([method, *varying])


def refuse_overlap(path: Path, training_ids: Sequence[str], test_ids: Sequence[str], allowed: bool) -> None:
    """Raises ValueError, or prints a line if `allowed`, if a model was trained on test images."""
    both = len(set(training_ids) & set(test_ids))
    if both == 0:
        return
    found = f"{path}: {both} of the {len(set(test_ids))} test images were trained on"
    if not allowed:
        raise ValueError(f"{found}; test with the split that it was trained with, or pass "
                         "--allow_overlap True")
    print(f"warning: {found}")


def columns(samples: Sequence[int]) -> list[str]:
    """The scores to print: GED at each n; the others at 32, as in the paper, or else the largest n."""
    n = matching_n(samples)
    others = [f"HM-IoU{n}", f"MDM{n}", f"Diversity{n}", "S_NCC", "Dice of means", "ECE"]
    return [f"GED{count}" for count in samples] + others


def scores_table(what: str, rows: Sequence[System], results: dict[str, Evaluation],
                 samples: Sequence[int]) -> str:
    """Markdown: ours, mean +- std over seeds, and below each method's rows what the paper reports for it."""
    names = columns(samples)
    lines = [f"| system | evaluations | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    last = {system.method: number for number, system in enumerate(rows)}
    for number, system in enumerate(rows):
        scores = results[system.label].mean_std()
        lines.append(_row(f"{system.label}, ours", str(system.evaluations), scores, names))
        paper = reported(what, system.method)
        if paper is not None and number == last[system.method]:
            lines.append(_row(f"{system.method}, paper", "", paper, names))
    return "\n".join(lines) + "\n"


def _row(name: str, evaluations: str, scores: Reported, names: Sequence[str]) -> str:
    cells = [_cell(*scores[column]) if column in scores else "-" for column in names]
    return f"| {name} | {evaluations} | {' | '.join(cells)} |"


def _cell(mean: float, std: float | None) -> str:
    return f"{mean:.3f}" if std is None else f"{mean:.3f} +- {std:.3f}"


def differences_table(rows: Sequence[System], results: dict[str, Evaluation], samples: Sequence[int],
                      groups: Sequence | np.ndarray) -> str:
    """Markdown: each system minus the reference (atfm, else the last row), with 95 % intervals.

    Of a paired bootstrap that resamples whole patients, as slices of one patient are not independent."""
    reference = next((system.label for system in rows if system.method == "atfm"), rows[-1].label)
    names = columns(samples)[:len(samples) + 2]
    lines = [f"| minus {reference} | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for system in rows:
        if system.label == reference:
            continue
        cells = []
        for name in names:
            ours, theirs = results[system.label].scores[name], results[reference].scores[name]
            difference, low, high = paired_bootstrap(ours, theirs, groups=groups)
            interval = f"[{low:+.3f}, {high:+.3f}]" if len(set(groups)) > 1 else "(one patient: no interval)"
            cells.append(f"{difference:+.3f} {interval}")
        lines.append(f"| {system.label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def report(settings: Settings, test: Slices, rows: Sequence[System], results: dict[str, Evaluation],
           seconds: dict[str, float], device: torch.device) -> dict:
    """All that a reader needs to trust or repeat the numbers, for results.json."""
    on_gpu = device.type == "cuda"
    hardware = torch.cuda.get_device_name(device) if on_gpu else platform.processor() or "CPU"
    return {
        "command": shlex.join(sys.argv),
        "versions": versions(),
        "hardware": f"{hardware}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "run": asdict(settings.run),
        "metadata": asdict(settings.experiment.metadata),
        "sampling": asdict(settings.experiment.sampling),
        "test_images": test.fingerprint,
        "groups": [str(group) for group in test.groups],
        "systems": {
            system.label: {"method": system.method, "alpha": system.alpha, "solver": system.solver,
                           "steps": system.steps, "evaluations": system.evaluations,
                           "seconds": seconds[system.label],
                           "checkpoints": system.checkpoints, **results[system.label].as_dict()}
            for system in rows
        },
    }


@torch.no_grad()
def draw(system: System, test: Slices, seed: int, folder: Path, device: torch.device) -> None:
    """Pictures of a system's samples on four test images, and of the uncertainty of the first."""
    chosen = [round(i * (len(test) - 1) / 3) for i in range(4)] if len(test) >= 4 else list(range(len(test)))
    image, masks = test.batch(chosen, device)
    samples = system.sample(image, 16, torch.Generator(device).manual_seed(seed)) >= 0.5
    image, masks, samples = image.cpu(), masks.cpu(), samples.float().cpu()
    name = system.label.replace(", ", "_").replace(" ", "_")
    fig.save(fig.prediction_grid(image, masks, samples), folder / f"{name}.png")
    fig.save(fig.variance_and_entropy(image[0], masks[0], samples[0]), folder / f"{name}_uncertainty.png")


def write(path: Path, text: str) -> None:
    """Writes a whole file or none."""
    with whole_file(path) as file:
        file.write(text.encode())
