"""Does the flow gain anything, and from what: against GTR's own samples and against simple controls.

Unless its name says otherwise, a row has the same GTR per seed, and as many steps and paths per step. All are
tested once on the same test images. Differences are of the same training run; their 95 % intervals resample
training runs and patients together. Then each run of the rows `best` on its own, over patients; then the rows
`paper` and `best` against larger GTRs alone. A row takes about 5 minutes per seed on one core, those of 4
times the length 20, and the GTR of a seed 3. What is done already is not repeated:

    python -m tests.benchmarks.gain --data_path <lidc .h5 file or pickle folder> --seeds 0 1 2
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from metrics import bootstrap_interval, two_level_interval, write_text
from metrics.parts import empty_correlation
from models.processes import one_line_errors
from tests.benchmarks.study import SCORES, Found, Runs, Study, Variant, finished, run, scores

GTR = ("--epochs 20 --batchsize 8 --lr 1e-3 --schedule cosine --ema 0.99 --num_filters 16 32 64 "
       "--validate_every 20").split()
FLOW = ("--batch_size 8 --lr 1e-3 --dim 16 --experts one --num_epochs 4 --validate_every 4 --val_images 8 "
        "--val_steps 1").split()
TEST = ("--methods act-gtr act-gtr-emptied atfm --samples 16 --seeds 0 --batch_size 8 "
        "--limit 120").split()
LEARNING = "--schedule cosine --clip 1 --ema 0.999 --weight_standardization none --time_scale 10"
ENDPOINT, COUPLED, SOFT = "--objective endpoint", "--coupling assigned", "--temperature 4"
NOISE = "--path_noise 0.5"
LONG = "--num_epochs 16 --validate_every 16"
FEW = "--steps 2"  # evaluations: more gained nothing on validation patients
PLAIN = "flow of the paper, learning rate falling"
SEMANTIC, SEES_GTR, RESIDUAL = "--alpha 0.2", "--condition gtr", "--residual True"
BEST = f"{LEARNING} {ENDPOINT} {COUPLED} {SOFT} {NOISE} {SEMANTIC} {SEES_GTR} {RESIDUAL}"
IMAGE_ALONE = f"{BEST} --residual False --condition image"  # what ST-Net sees
ROWS = (
    Variant("paper", gtr=""),
    Variant(PLAIN, flow=LEARNING),
    Variant("endpoint", flow=f"{LEARNING} {ENDPOINT}"),
    Variant("coupling", flow=f"{LEARNING} {COUPLED}"),
    Variant("temperature 4", flow=f"{LEARNING} {SOFT}"),
    Variant("noise", flow=f"{LEARNING} {NOISE}"),
    Variant("semantic term of weight 0.2", flow=f"{LEARNING} {SEMANTIC}"),
    Variant("the net sees GTR's mean and deviation", flow=f"{LEARNING} {SEES_GTR}"),
    Variant("best without endpoint and residual", flow=f"{BEST} --residual False --objective velocity",
            test=FEW),
    Variant("best without coupling", flow=f"{BEST} --coupling independent", test=FEW),
    Variant("best without temperature", flow=f"{BEST} --temperature 1", test=FEW),
    Variant("best without noise", flow=f"{BEST} --path_noise 0", test=FEW),
    Variant("best without semantic term", flow=f"{BEST} --alpha 1e-3", test=FEW),
    Variant("best without residual", flow=f"{BEST} --residual False", test=FEW),
    Variant("best without residual, image alone", flow=IMAGE_ALONE, test=FEW),
    Variant("image alone, noise 1", flow=f"{IMAGE_ALONE} --path_noise 1", test=FEW),
    Variant("image alone, noise 2", flow=f"{IMAGE_ALONE} --path_noise 2", test=FEW),
    Variant("image alone, temperature 2", flow=f"{IMAGE_ALONE} --temperature 2", test=FEW),
    Variant("image alone, 4 draws per expert", flow=f"{IMAGE_ALONE} --draws 4", test=FEW),
    Variant("best at t = 0 only", flow=f"{BEST} --times zero", test="--steps 1"),
    Variant("best", flow=BEST, test=FEW),
    Variant("paper, 4 times as long", flow=LONG),
    Variant("best, 4 times as long", flow=f"{BEST} {LONG}", test="--steps 4"),
    Variant("image alone, 4 times as long", flow=f"{IMAGE_ALONE} {LONG}", test="--steps 4"),
    Variant("no residual, images flipped and turned, 4 times as long",
            flow=f"{BEST} --residual False --dihedral True {LONG}", test="--steps 4"),
    Variant("GTR alone, as long as both steps", gtr="--epochs 60 --validate_every 20", flow=None),
    Variant("GTR alone, twice as wide", gtr="--num_filters 32 64 128", flow=None),
)
CONTROLS = {"act-gtr": "Act. GTR", "act-gtr-emptied": "emptied"}
ALONE = [row.name for row in ROWS if row.flow is None]
PAPERS = ("paper", "paper, 4 times as long")
BESTS = ("best", "best, 4 times as long", "image alone, 4 times as long")


def against(runs: Runs, controls: Runs, control: str, score: str) -> str:
    """Mean difference of ATFM from a control, with the two-level interval, and in per cent of the control.

    Of the seeds that both have."""
    seeds = sorted(runs.keys() & controls.keys())
    ours, theirs = (scores({seed: of[seed] for seed in seeds}, system, score)
                    for of, system in ((runs, "atfm"), (controls, control)))
    mean, low, high = two_level_interval(ours - theirs, next(iter(runs.values()))["groups"])
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}] ({mean / theirs.mean():+.0%})"


def table(found: Found) -> str:
    """Markdown: a row per choice, and GTR's own scores above."""
    names = [f"{score} minus {name}" for name in CONTROLS.values() for score in SCORES]
    none = [""] * len(names)
    lines = [f"| row | runs | NFE | GED16 | HM-IoU16 | {' | '.join(names)} | empty, correlation |",
             "|---" * (6 + len(names)) + "|"]
    flows = {name: runs for name, runs in found.items() if name not in ALONE}
    if flows:
        most = max(flows.values(), key=len)
        lines += [_line(title, most, system, none) for system, title in CONTROLS.items()]
    for name, runs in flows.items():
        cells = [against(runs, runs, control, score) for control in CONTROLS for score in SCORES]
        lines.append(_line(name, runs, "atfm", cells))
    lines += [_line(name, found[name], "act-gtr", none) for name in ALONE if name in found]
    return "\n".join(lines) + "\n"


def _line(name: str, runs: Runs, system: str, differences: Sequence[str]) -> str:
    """A row of the table: of one of the systems of a row's runs."""
    flows = [content["systems"][system] for content in runs.values()]
    empty = [{key: np.array(flow["scores"][key]) for key in ("Empty", "Experts empty")} for flow in flows]
    means = [f"{scores(runs, system, score).mean():.3f}" for score in SCORES]
    shares = (f"{np.mean([one['Empty'].mean() for one in empty]):.2f}, "
              f"{np.mean([empty_correlation(one) for one in empty]):+.2f}")
    cells = [name, str(len(runs)), str(flows[0]["nfe"]), *means, *differences, shares]
    return f"| {' | '.join(cells)} |"


def runs_table(row: str, runs: Runs) -> str:
    """Markdown: GTR, controls and ATFM of each training run, and its difference from them over patients."""
    names = [f"{score} minus {name}" for name in CONTROLS.values() for score in SCORES]
    lines = [f"| {row}, seed | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for seed, content in runs.items():
        one, cells = {seed: content}, []
        for control in CONTROLS:
            for score in SCORES:
                difference = scores(one, "atfm", score) - scores(one, control, score)
                mean, low, high = bootstrap_interval(difference, content["groups"])
                cells.append(f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]")
        lines.append(f"| {seed} | {' | '.join(cells)} |")
    return "\n" + "\n".join(lines) + "\n"


def alone_table(found: Found) -> str:
    """Markdown: paper and best, by length of training, minus each GTR alone; empty where none is done."""
    lines = []
    for row in (*PAPERS, *BESTS):
        for alone in ALONE:
            if found.get(row, {}).keys() & found.get(alone, {}).keys():
                cells = [against(found[row], found[alone], "act-gtr", score) for score in SCORES]
                lines.append(f"| {row} | {alone} | {' | '.join(cells)} |")
    head = [f"| row | minus | {' | '.join(SCORES)} |", "|---" * (2 + len(SCORES)) + "|"]
    return "\n" + "\n".join([*head, *lines]) + "\n" if lines else ""


def main(flags: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_path", required=True, help="LIDC: an .h5 file or the folder of pickles")
    parser.add_argument("--output_path", type=Path, default=Path("runs/gain"),
                        help="a folder per seed and row, table.md")
    parser.add_argument("--crop", default="32", help="centre crop, pixels per side")
    parser.add_argument("--steps", default="4", help="of the flow in testing")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of both stages' training")
    names = [row.name for row in ROWS]
    parser.add_argument("--rows", nargs="*", default=names, choices=names, metavar="ROW",
                        help="which, by their names in the table; none: only print it")
    arguments = parser.parse_args(flags)
    root = arguments.output_path
    study = Study(ROWS, GTR, FLOW, TEST, ["--steps", arguments.steps])
    for row in (row for row in ROWS if row.name in arguments.rows):
        for seed in arguments.seeds:
            common = ["--data_path", arguments.data_path, "--crop", arguments.crop, "--seed", str(seed)]
            run(study, row, root / f"seed{seed}", common)
    found = finished(study, root)
    each = [runs_table(name, found[name]) for name in BESTS if name in found]
    text = "".join([table(found), *each, alone_table(found)])
    write_text(root / "table.md", text)
    print(text)


if __name__ == "__main__":
    with one_line_errors():
        main()
