"""Where the data lies, and every number the scripts use, each with its reason or source.

Edit PATHS first. Everything else is a default that a flag of the same name overrides (`--lr 1e-3`).
"Paper" is ATFM, arXiv 2511.06857; "released" is its authors' code of November 2025.
"""

import dataclasses
import os
from dataclasses import dataclass, field
from typing import Any

# ---------------------------------------------------------------------------------------------- edit these paths
PATHS = {
    "LIDC": "datasets/LIDC",  # a folder of .pickle files, one .pickle file, or an .h5 file
    "isic3_style_concat": "datasets/ISIC3",  # a folder with Images/ and Segmentations/
}
# Without editing: `export ATFM_LIDC_PATH=...`, `export ATFM_ISIC3_STYLE_CONCAT_PATH=...`, or `--data_path ...`.
# ----------------------------------------------------------------------------------------------------------------


def setting(default: Any, why: str, choices: tuple[str, ...] = ()) -> Any:
    """A dataclass field that is also a flag: its default, the reason for it, and the values it may take."""
    return field(default=default, metadata={"why": why, "choices": choices})


@dataclass(frozen=True)
class Metadata:
    """A dataset: where it is, what it holds, how it is split."""

    what: str = setting("LIDC", "name of the dataset")
    reader: str = setting("lidc", "format of the source", ("lidc", "isic3"))
    data_path: str = setting("", "folder or file of the dataset")
    channels: int = setting(1, "image channels that GTR sees")
    annotators: int = setting(4, "expert masks per image, k")
    size: int = setting(128, "pixels per side")
    split: str = setting("group", "group: 64/16/20 with no patient (LIDC) or image (ISIC3) on two sides; "
                                  "released: the authors' overlapping lists, for comparison", ("group", "released"))
    split_seed: int = setting(0, "seed of the 64/16/20 split; apart from --seed, so that runs share their test set")
    limit: int | None = setting(None, "use the first N images of each split")
    crop: int | None = setting(None, "centre crop to S x S pixels")
    augment: bool = setting(False, "flip, rotate, scale and shear training images together with their masks")


@dataclass(frozen=True)
class GTRConfig:
    """Step 1: training the Gaussian Truncation Representation, section 1.1 of the glossary in `models`."""

    epochs: int = setting(1000, "passes over the training images (paper, LIDC: 1000; ISIC3: 400)")
    batchsize: int = setting(256, "images per step (paper, LIDC: 256; ISIC3: 8)")
    lr: float = setting(1e-4, "learning rate (paper, App. 6)")
    optimizer: str = setting("adam", "paper: adam; released: adamw", ("adam", "adamw"))
    weight_decay: float = setting(0.0, "paper: none; released: 1e-4")
    num_filters: tuple[int, ...] = setting((32, 64, 128, 192), "filters per U-Net level (paper, App. 6)")
    rank: int = setting(10, "columns of the covariance factor D, r (paper, App. 6)")
    convs: int = setting(2, "convolutions per block (paper: 2; released: 3)")
    pool: str = setting("max", "paper: max; released: avg", ("max", "avg"))
    up: str = setting("transposed", "paper: transposed convolution; released: bilinear", ("transposed", "bilinear"))
    mc_samples: int = setting(20, "Monte Carlo samples per image, M: 10 deviations and their negatives (paper, Eq. 5)")
    experts: str = setting("one", "one: a random expert per image and step (released); all: the likelihood under each, "
                                  "averaged", ("one", "all"))


@dataclass(frozen=True)
class PriorConfig:
    """Step 2: training the flow (ST-Net) from the frozen GTR, Algorithm 1."""

    gtr: str | None = setting(None, "run folder or checkpoint of step 1 (default: <output_path>/GTR)")
    num_epochs: int = setting(200, "passes over the training images (paper, LIDC: 200; ISIC3: 120)")
    batch_size: int = setting(6, "images per step, each with all its annotators (paper, LIDC: 6; ISIC3: 1)")
    lr: float = setting(1e-4, "learning rate of Adam (paper, App. 6)")
    dim: int = setting(128, "width of ST-Net (LIDC: 128; released ISIC3 script: 256)")
    dim_mults: tuple[int, ...] = setting((1, 2, 4), "width multipliers per level (App. 6)")
    weight_standardization: str = setting("standard", "standard: divide by the standard deviation (arXiv 1903.10520); "
                                          "released: multiply by it; none", ("standard", "released", "none"))
    time_scale: float = setting(1000.0, "t is multiplied by this before its sinusoidal embedding (released: 1)")
    alpha: float = setting(1e-3, "weight of the semantic term L_SF (paper, LIDC: 1e-3; ISIC3: 1e-4)")
    dice: str = setting("soft", "soft: Dice with a gradient; thresholded: the released code's, whose gradient is zero",
                        ("soft", "thresholded"))
    dice_over: str = setting("image", "one Dice per image, or one over the batch (released)", ("image", "batch"))
    semantic_target: str = setting("own", "compare x_1^t on annotator i's path with annotator i's mask, or with all",
                                   ("own", "all"))


@dataclass(frozen=True)
class LoopConfig:
    """The training loop, the same for both steps."""

    save_model: bool = setting(True, "write checkpoints; False: train and validate only")
    save_model_step: int = setting(50, "keep every N-th epoch's checkpoint besides the last and the best")
    validate_every: int = setting(5, "epochs between validations; the last epoch is always validated")
    val_images: int = setting(32, "held-out images per validation, evenly spaced over the validation split")
    val_samples: int = setting(16, "samples per image in a validation")
    val_steps: int = setting(10, "Euler steps in a validation of the flow: enough to rank checkpoints")


@dataclass(frozen=True)
class TestConfig:
    """Testing: sampling and scoring held-out images."""

    gtr: str | None = setting(None, "run folder or checkpoint of step 1 (default: <output_path>/GTR)")
    prior: str | None = setting(None, "run folder or checkpoint of step 2 (default: <output_path>/prior)")
    steps: int = setting(25, "solver steps from t = 0 to 1 (paper: 25; released ISIC3 test script: 50)")
    samples: tuple[int, ...] = setting((16, 32, 100), "n of GED_n; HM-IoU and MDM are printed at each too")
    seeds: tuple[int, ...] = setting((0, 1, 2, 3, 4), "one run of sampling per seed (paper: five runs)")
    batch_size: int = setting(50, "states x_t integrated at once; bounds memory")


@dataclass(frozen=True)
class RunConfig:
    """What all scripts share."""

    output_path: str | None = setting(None, "folder of this experiment (default: runs/<what>)")
    preset: str = setting("paper", "paper, or released: what the authors' code does", ("paper", "released"))
    seed: int = setting(0, "seed of initialization and of every step's randomness")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, ...; auto takes CUDA when there is one")


@dataclass(frozen=True)
class Dataset:
    """A dataset with the settings of each stage on it."""

    metadata: Metadata
    gtr: GTRConfig = GTRConfig()
    prior: PriorConfig = PriorConfig()
    loop: LoopConfig = LoopConfig()
    test: TestConfig = TestConfig()


DATASETS = {
    "LIDC": Dataset(Metadata("LIDC")),
    "isic3_style_concat": Dataset(
        Metadata("isic3_style_concat", reader="isic3", channels=3, annotators=3, size=256, augment=True),
        gtr=GTRConfig(epochs=400, batchsize=8),
        prior=PriorConfig(num_epochs=120, batch_size=1, dim=256, alpha=1e-4),
    ),
}

# What a preset changes, by configuration; REFERENCE of each choice: README, "Where the sources disagree".
PRESETS: dict[str, dict[type, dict[str, Any]]] = {
    "paper": {},
    "released": {
        Metadata: {"split": "released"},
        GTRConfig: {"convs": 3, "pool": "avg", "up": "bilinear", "optimizer": "adamw", "weight_decay": 1e-4},
        PriorConfig: {"weight_standardization": "released", "time_scale": 1.0,
                      "dice": "thresholded", "dice_over": "batch"},
    },
}

# The paper's tables 1-2: mean and standard deviation of five runs, None where none is printed.
PAPER_COLUMNS = ("GED16", "GED32", "GED100", "HM-IoU32", "MDM32")
PAPER_TABLES: dict[str, dict[str, tuple[tuple[float, float | None] | None, ...]]] = {
    "LIDC": {
        "Prob. U-Net": ((.310, .010), (.303, .010), (.252, .004), (.548, .000), (.681, .020)),
        "PHiSeg": ((.262, None), (.247, None), (.224, .004), (.595, None), (.704, .020)),
        "SSN": ((.259, None), (.243, .010), (.225, .002), (.550, .010), None),
        "MoSE": ((.218, .003), (.195, .002), (.189, .002), (.624, .004), (.767, .004)),
        "P2SAM": ((.208, None), (.206, None), None, (.627, None), (.939, None)),
        "CIMD": (None, None, (.321, None), (.592, .002), (.915, .004)),
        "AB": ((.213, .001), (.196, .002), (.193, .002), (.619, .001), (.792, .002)),
        "CCDM": ((.212, .001), (.194, .001), (.183, .002), (.631, .002), (.790, .003)),
        "ATFM": ((.206, .002), (.188, .001), (.162, .002), (.667, .002), (.948, .001)),
    },
    "isic3_style_concat": {
        "Prob. U-Net": ((.202, .003), (.187, .003), (.171, .002), (.697, .005), (.927, .003)),
        "SSN": ((.197, .007), (.181, .004), (.167, .002), (.700, .004), (.939, .001)),
        "c-Prob. U-Net": ((.208, .004), (.202, .005), (.179, .002), (.719, .004), (.925, .004)),
        "c-SSN": ((.200, .007), (.195, .007), (.177, .001), (.725, .004), (.931, .003)),
        "ATFM": ((.183, .001), (.152, .002), (.147, .003), (.732, .003), (.942, .002)),
    },
}


def dataset(what: str, preset: str = "paper") -> Dataset:
    """The settings of dataset `what` under a preset, its path taken from the environment or PATHS.

    Raises ValueError for a name that is not in DATASETS or PRESETS."""
    for name, known, flag in ((what, DATASETS, "--what"), (preset, PRESETS, "--preset")):
        if name not in known:
            raise ValueError(f"{flag} {name}: unknown; expected one of {', '.join(known)}")
    found = DATASETS[what]
    changed = {}
    for part in dataclasses.fields(found):
        value = getattr(found, part.name)
        changed[part.name] = dataclasses.replace(value, **PRESETS[preset].get(type(value), {}))
    path = os.environ.get(f"ATFM_{what.upper()}_PATH", PATHS.get(what, ""))
    changed["metadata"] = dataclasses.replace(changed["metadata"], data_path=path)
    return Dataset(**changed)


def metadata(what: str) -> Metadata:
    """The entry of a dataset by name, its path resolved."""
    return dataset(what).metadata
