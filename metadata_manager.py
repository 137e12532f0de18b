"""Where the data lies, and every number the scripts use, each with its reason or source.

Edit PATHS first. Everything else is a default that a flag of the same name overrides (`--lr 1e-3`).
"Paper" is ATFM, arXiv 2511.06857; "released" is its authors' code of November 2025.
"""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

# Edit these paths, or `export ATFM_LIDC_PATH=...` (ATFM_ISIC3_STYLE_CONCAT_PATH), or pass `--data_path ...`.
PATHS = {
    "LIDC": "datasets/LIDC",  # a folder of .pickle files, one .pickle file, or an .h5 file
    "isic3_style_concat": "datasets/ISIC3",  # a folder with Images/ and Segmentations/
    "LIDC_demo": str(Path(__file__).parent / "data" / "LIDC_demo.h5"),  # embedded: nothing to edit
    "isic3_demo": str(Path(__file__).parent / "data" / "isic3_demo.h5"),
}

PRESETS = ("paper", "released", "best")
SOLVERS = ("euler", "midpoint", "heun", "rk4", "ab2")
# The systems of the papers' tables, as what they change in PriorConfig (Table 4; CFM: arXiv 2507.22418).
METHODS: dict[str, dict[str, Any]] = {
    "atfm": {},
    "atfm-no-sf": {"alpha": 0.0},
    "sfm": {"source": "normal"},
    "sfm-no-sf": {"source": "normal", "alpha": 0.0},
    "cfm": {"source": "normal", "alpha": 0.0, "experts": "one", "signed": True,
            "condition_dropout": 0.5, "guidance": 0.3, "batch_size": 64,
            "solver": "midpoint", "steps": 100},
}
FLOWS = tuple(METHODS)


def setting(default: Any, why: str, choices: tuple[str, ...] = ()) -> Any:
    """A dataclass field that is also a flag: its default, the reason for it, and the values it may take."""
    return field(default=default, metadata={"why": why, "choices": choices})


@dataclass(frozen=True)
class Metadata:
    """A dataset: what it holds (facts, checked against the files), then where it is and how it is used."""

    what: str = "LIDC"
    reader: str = "lidc"  # format of the source: lidc or isic3
    channels: int = 1  # of the image that GTR sees; ST-Net sees it in grey
    annotators: int = 4  # expert masks per image, k
    size: int = 128  # pixels per side in the files, before `crop`
    data_path: str = setting("", "folder or file of the dataset")
    split: str = setting("group", "group: 64/16/20 with no patient (LIDC) or image (ISIC3) on two sides; "
                                  "released: the authors' overlapping lists, for comparison; "
                                  "file: as in a file of PHiSeg or CCDM", ("group", "released", "file"))
    split_seed: int = setting(0, "seed of the 64/16/20 split; not --seed, so that runs share their test set")
    limit: int | None = setting(None, "use the first N images of each split")
    crop: int | None = setting(None, "centre crop to S x S pixels")
    augment: bool = setting(False, "flip, rotate, scale and shear training images together with their masks")


@dataclass(frozen=True)
class GTRConfig:
    """Step 1: training the Gaussian Truncation Representation, Eq. 3-5."""

    epochs: int = setting(1000, "passes over the training images (paper, LIDC: 1000; ISIC3: 400)")
    batchsize: int = setting(256, "images per step (paper, LIDC: 256; ISIC3: 8)")
    lr: float = setting(1e-4, "learning rate (paper, App. 6)")
    weight_decay: float = setting(0.0, "of AdamW; at 0 (paper) it is Adam; released: 1e-4")
    ema: float = setting(0.0, "decay of the moving average of weights that is validated and used; 0: none")
    num_filters: tuple[int, ...] = setting((32, 64, 128, 192), "filters per U-Net level (paper, App. 6)")
    rank: int = setting(10, "columns of the covariance factor D, r (paper, App. 6)")
    convs: int = setting(2, "convolutions per block (paper: 2; released: 3)")
    pool: str = setting("max", "paper: max; released: avg", ("max", "avg"))
    up: str = setting("transposed", "paper: transposed convolution; released: bilinear",
                      ("transposed", "bilinear"))
    mc_samples: int = setting(20, "Monte Carlo samples per image, M: 10 draws and their negatives (Eq. 5)")
    experts: str = setting("one", "one: a random expert per image and step (released); all: the likelihood "
                                  "under each, averaged", ("one", "all"))


@dataclass(frozen=True)
class PriorConfig:
    """Step 2: training the flow (ST-Net) from the frozen GTR, Algorithm 1."""

    gtr: str | None = setting(None, "run folder or checkpoint of step 1 (default: <output_path>/GTR)")
    num_epochs: int = setting(200, "passes over the training images (paper, LIDC: 200; ISIC3: 120)")
    batch_size: int = setting(6, "images per step, each with all its annotators (paper, LIDC: 6; ISIC3: 1)")
    lr: float = setting(1e-4, "learning rate of Adam (paper, App. 6)")
    ema: float = setting(0.0, "decay of the moving average of weights that is validated and tested; 0: none")
    dim: int = setting(128, "width of ST-Net (LIDC: 128; released ISIC3 script: 256)")
    dim_mults: tuple[int, ...] = setting((1, 2, 4), "width multipliers per level (App. 6)")
    alphas: tuple[float, ...] = setting((), "train one flow per alpha, each into its own folder")
    annotators_per_pass: int = setting(1, "annotators per forward and backward pass: the gradients add up to "
                                          "those of all k at once, the memory is that of one pass")
    checkpoint: bool = setting(False, "gradient checkpointing in ST-Net: recompute activations, keep none")
    amp: bool = setting(False, "run ST-Net in bfloat16; losses and GTR stay in float32")
    channels_last: bool = setting(False, "train ST-Net in the layout that CUDA's convolutions are fastest in")
    compile: bool = setting(False, "torch.compile ST-Net: minutes at the start, faster from then on")
    solver: str = setting("euler", "of the ODE in testing (paper: euler; CFM: midpoint)", SOLVERS)
    steps: int = setting(25, "solver steps in testing (paper: 25; released ISIC3 test script: 50; CFM: 100)")
    weight_standardization: str = setting(
        "standard",
        "standard: divide by the standard deviation (arXiv 1903.10520); released: multiply by it; none",
        ("standard", "released", "none"))
    time_scale: float = setting(1000.0, "t times this goes into the sinusoidal embedding (released: 1)")
    groups: int = setting(1, "groups of GroupNorm in ST-Net's residual blocks (released: 1)")
    method: str = setting("atfm", "the system to train, a row of METHODS; its fields below follow from it",
                          FLOWS)
    source: str = setting("gtr", "x_0: a sample of GTR, or standard normal noise", ("gtr", "normal"))
    experts: str = setting("all", "all annotators of an image per step, or one at random", ("all", "one"))
    signed: bool = setting(False, "the flow's masks are -1 / 1 rather than 0 / 1 (CFM)")
    condition_dropout: float = setting(0.0, "share of training images replaced by zeros (CFM: 0.5)")
    guidance: float = setting(0.0, "w in (1 + w) v(image) - w v(zeros) when sampling (CFM: 0.3)")
    alpha: float = setting(1e-3, "weight of the semantic term L_SF (paper, LIDC: 1e-3; ISIC3: 1e-4)")
    dice: str = setting("soft", "soft: Dice with a gradient; thresholded: the released code's, without",
                        ("soft", "thresholded"))
    dice_over: str = setting("image", "one Dice per image, or one over the batch (released)",
                             ("image", "batch"))
    semantic_target: str = setting("own", "compare x_1^t on the path to an annotator with that one's mask, "
                                          "or with all", ("own", "all"))


@dataclass(frozen=True)
class LoopConfig:
    """The training loop, the same for both steps."""

    save_model: bool = setting(True, "write checkpoints; False: train and validate only")
    save_model_step: int = setting(50, "keep every N-th epoch's checkpoint besides the last and the best")
    skip_nonfinite: bool = setting(False, "leave out and count batches whose loss or gradient is not finite")
    validate_every: int = setting(5, "epochs between validations; the last epoch is always validated")
    val_images: int = setting(32, "held-out images per validation, evenly spaced over the validation split")
    val_samples: int = setting(16, "samples per image in a validation")
    val_steps: int = setting(10, "Euler steps in a validation of the flow: enough to rank checkpoints")


@dataclass(frozen=True)
class SamplingConfig:
    """Testing: sampling and scoring held-out images with the models of both stages."""

    gtr: str | None = setting(None, "run folder or checkpoint of step 1 (default: <output_path>/GTR)")
    prior: str | None = setting(None, "run folder or checkpoint of step 2 (default: <output_path>/<method>)")
    methods: tuple[str, ...] = setting(("act-gtr", "atfm"), "systems; act-gtr: GTR's samples, no flow",
                                       ("act-gtr", *FLOWS))
    solver: tuple[str, ...] = setting((), "solvers of the flow's ODE, a row each (default: the method's)",
                                      SOLVERS)
    steps: tuple[int, ...] = setting((), "numbers of solver steps, a row each (default: the method's)")
    alphas: tuple[float, ...] = setting((), "flows trained with --alphas, a row each")
    samples: tuple[int, ...] = setting((16, 32, 100), "n of GED_n, HM-IoU_n, MDM_n (paper: 16, 32, 100)")
    seeds: tuple[int, ...] = setting((0, 1, 2, 3, 4), "one run of sampling per seed (paper: five runs)")
    batch_size: int | None = setting(None, "states x_t integrated at once; bounds memory (default: as "
                                           "many as a GPU's free memory holds, 8 on a CPU)")
    amp: bool = setting(False, "run ST-Net in bfloat16")
    channels_last: bool = setting(False, "run ST-Net in the layout that CUDA's convolutions are fastest in")
    compile: bool = setting(False, "torch.compile ST-Net: minutes at the start, faster from then on")
    released_checkpoint: bool = setting(False, "--gtr and --prior are files of weights of the authors' code")
    images: tuple[str, ...] = setting((), "draw samples for these image files of yours instead of testing")
    allow_overlap: bool = setting(False, "test even if test images were trained on (as in split released)")


@dataclass(frozen=True)
class RunConfig:
    """What all scripts share."""

    output_path: str | None = setting(None, "folder of this experiment (default: runs/<what>)")
    preset: str = setting("paper", "paper; released: what the authors' code does; best: what did better than "
                                   "paper in a small study", PRESETS)
    seed: int = setting(0, "seed of initialization and of every step's randomness")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, ...; auto takes CUDA when there is one")
    deterministic: bool = setting(False, "repeat runs bit for bit on CUDA too, slower")


@dataclass(frozen=True)
class Experiment:
    """A dataset with the settings of each stage on it."""

    metadata: Metadata
    gtr: GTRConfig = GTRConfig()
    prior: PriorConfig = PriorConfig()
    loop: LoopConfig = LoopConfig()
    sampling: SamplingConfig = SamplingConfig()


EXPERIMENTS = {
    "LIDC": Experiment(Metadata()),
    "isic3_style_concat": Experiment(
        Metadata("isic3_style_concat", reader="isic3", channels=3, annotators=3, size=256, augment=True),
        gtr=GTRConfig(epochs=400, batchsize=8),
        prior=PriorConfig(num_epochs=120, batch_size=1, dim=256, alpha=1e-4),
    ),
    # The demos: minutes on a CPU.
    "LIDC_demo": Experiment(
        Metadata("LIDC_demo", size=64, crop=32),
        gtr=GTRConfig(epochs=15, batchsize=16, lr=1e-3, num_filters=(16, 32, 64)),
        # So short a training learns v near t = 0 before it learns it near t = 1, hence few solver steps.
        prior=PriorConfig(num_epochs=3, batch_size=8, experts="one", lr=2e-3, ema=0.99, dim=8,
                          dim_mults=(1, 4, 8), time_scale=10.0, steps=2),
        loop=LoopConfig(validate_every=3, val_samples=8, val_steps=2),
        sampling=SamplingConfig(samples=(16,), seeds=(0, 1, 2)),
    ),
    "isic3_demo": Experiment(
        Metadata("isic3_demo", reader="isic3", channels=3, annotators=3, size=64, crop=48, augment=True),
        gtr=GTRConfig(epochs=15, batchsize=8, lr=1e-3, num_filters=(16, 32, 64)),
        prior=PriorConfig(num_epochs=6, batch_size=8, experts="one", lr=2e-3, ema=0.99, dim=8,
                          dim_mults=(1, 4, 8), time_scale=10.0, alpha=1e-4, steps=2),
        loop=LoopConfig(validate_every=3, val_samples=8, val_steps=2),
        sampling=SamplingConfig(samples=(16,), seeds=(0, 1, 2)),
    ),
}

def released(ours: Experiment) -> Experiment:
    """The authors' code as it runs, the preset `released`: see README, "Where the sources disagree"."""
    isic3 = ours.metadata.reader == "isic3"
    return Experiment(
        replace(ours.metadata, split="released"),
        replace(ours.gtr, convs=3, pool="avg", up="bilinear", weight_decay=1e-4),
        replace(ours.prior, weight_standardization="released", time_scale=1.0, dice="thresholded",
                dice_over="batch", steps=50 if isic3 else 25),
        ours.loop,
        replace(ours.sampling, allow_overlap=True),
    )


def best(ours: Experiment) -> Experiment:
    """What did better than `paper` on held-out patients, at small scale: README, "Findings".

    Averages of weights in both stages; one expert per step, and as many more steps as there are experts, at
    the same cost; weights not standardized; a slower embedding of time."""
    prior = replace(ours.prior, experts="one", num_epochs=ours.prior.num_epochs * ours.metadata.annotators,
                    ema=0.999, weight_standardization="none", time_scale=10.0)
    return replace(ours, gtr=replace(ours.gtr, ema=0.99), prior=prior)


def experiment(what: str, preset: str = "paper") -> Experiment:
    """The settings of dataset `what` under a preset; its path from the environment, else PATHS.

    Raises ValueError for a name that is not in EXPERIMENTS, or a preset that is not in PRESETS.
    """
    if what not in EXPERIMENTS:
        raise ValueError(f"--what {what}: unknown dataset; expected one of {', '.join(EXPERIMENTS)}")
    if preset not in PRESETS:
        raise ValueError(f"--preset {preset}: unknown; expected one of {', '.join(PRESETS)}")
    found = EXPERIMENTS[what]
    path = os.environ.get(f"ATFM_{what.upper()}_PATH") or PATHS[what]
    found = replace(found, metadata=replace(found.metadata, data_path=path))
    changed = {"paper": found, "released": released(found), "best": best(found)}
    return changed[preset]


# The paper's tables 1-2: (mean, standard deviation of five runs or None). Lower GED is better.
Reported = dict[str, tuple[float, float | None]]
PAPER_TABLES: dict[str, dict[str, Reported]] = {
    "LIDC": {
        "Prob. U-Net": {"GED16": (0.310, 0.010), "GED32": (0.303, 0.010), "GED100": (0.252, 0.004),
                        "HM-IoU32": (0.548, 0.000), "MDM32": (0.681, 0.020)},
        "PHiSeg": {"GED16": (0.262, None), "GED32": (0.247, None), "GED100": (0.224, 0.004),
                   "HM-IoU32": (0.595, None), "MDM32": (0.704, 0.020)},
        "SSN": {"GED16": (0.259, None), "GED32": (0.243, 0.010),
                "GED100": (0.225, 0.002), "HM-IoU32": (0.550, 0.010)},
        "MoSE": {"GED16": (0.218, 0.003), "GED32": (0.195, 0.002), "GED100": (0.189, 0.002),
                 "HM-IoU32": (0.624, 0.004), "MDM32": (0.767, 0.004)},
        "P2SAM": {"GED16": (0.208, None), "GED32": (0.206, None),
                  "HM-IoU32": (0.627, None), "MDM32": (0.939, None)},
        "CIMD": {"GED100": (0.321, None), "HM-IoU32": (0.592, 0.002), "MDM32": (0.915, 0.004)},
        "AB": {"GED16": (0.213, 0.001), "GED32": (0.196, 0.002), "GED100": (0.193, 0.002),
               "HM-IoU32": (0.619, 0.001), "MDM32": (0.792, 0.002)},
        "CCDM": {"GED16": (0.212, 0.001), "GED32": (0.194, 0.001), "GED100": (0.183, 0.002),
                 "HM-IoU32": (0.631, 0.002), "MDM32": (0.790, 0.003)},
        "ATFM": {"GED16": (0.206, 0.002), "GED32": (0.188, 0.001), "GED100": (0.162, 0.002),
                 "HM-IoU32": (0.667, 0.002), "MDM32": (0.948, 0.001)},
    },
    "isic3_style_concat": {
        "Prob. U-Net": {"GED16": (0.202, 0.003), "GED32": (0.187, 0.003), "GED100": (0.171, 0.002),
                        "HM-IoU32": (0.697, 0.005), "MDM32": (0.927, 0.003)},
        "SSN": {"GED16": (0.197, 0.007), "GED32": (0.181, 0.004), "GED100": (0.167, 0.002),
                "HM-IoU32": (0.700, 0.004), "MDM32": (0.939, 0.001)},
        "c-Prob. U-Net": {"GED16": (0.208, 0.004), "GED32": (0.202, 0.005), "GED100": (0.179, 0.002),
                          "HM-IoU32": (0.719, 0.004), "MDM32": (0.925, 0.004)},
        "c-SSN": {"GED16": (0.200, 0.007), "GED32": (0.195, 0.007), "GED100": (0.177, 0.001),
                  "HM-IoU32": (0.725, 0.004), "MDM32": (0.931, 0.003)},
        "ATFM": {"GED16": (0.183, 0.001), "GED32": (0.152, 0.002), "GED100": (0.147, 0.003),
                 "HM-IoU32": (0.732, 0.003), "MDM32": (0.942, 0.002)},
    },
}

# The ablation on LIDC (paper, Table 4).
PAPER_ABLATION: dict[str, Reported] = {
    "act-gtr": {"GED100": (0.230, None), "HM-IoU32": (0.550, None)},
    "sfm-no-sf": {"GED100": (0.185, None), "HM-IoU32": (0.624, None)},
    "sfm": {"GED100": (0.176, None), "HM-IoU32": (0.631, None)},
    "atfm-no-sf": {"GED100": (0.249, None), "HM-IoU32": (0.597, None)},
    "atfm": {"GED100": (0.162, None), "HM-IoU32": (0.667, None)},
}


def reported(what: str, method: str) -> Reported | None:
    """What the paper reports for a method on a dataset, in its main tables, else the ablation; or None."""
    if method == "atfm" and what in PAPER_TABLES:
        return PAPER_TABLES[what]["ATFM"]
    return PAPER_ABLATION.get(method) if what == "LIDC" else None
