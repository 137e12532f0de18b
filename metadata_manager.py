"""Where the data lies, and every number that the scripts use, each with its reason or source.

Edit PATHS first. Everything else is a default that a flag of the same name overrides (`--lr 1e-3`), see
models/flags.py. "Paper" is ATFM, arXiv 2511.06857; "released" is its authors' code of November 2025.
"""

import importlib
import os
import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

# Edit these paths, or `export ATFM_LIDC_PATH=...` (ATFM_ISIC3_STYLE_CONCAT_PATH), or pass `--data_path ...`.
PATHS = {
    "LIDC": "datasets/LIDC",  # a folder of .pickle files, one .pickle file, or an .h5 file
    "isic3_style_concat": "datasets/ISIC3",  # a folder with Images/ and Segmentations/
    "MMIS": "datasets/MMIS2024TASK1",  # a folder with training/, validation/ and testing/
    "LIDC_demo": str(Path(__file__).parent / "data" / "LIDC_demo.h5"),  # embedded: nothing to edit
    "isic3_demo": str(Path(__file__).parent / "data" / "isic3_demo.h5"),
}

PRESETS = ("paper", "released", "best")
GREY = (0.299, 0.587, 0.114)  # weights of R, G and B in the grey image that ST-Net sees (released code)
# The flows of the papers' tables, as what they change in FlowConfig (Table 4; CFM: arXiv 2507.22418).
FLOWS: dict[str, dict[str, Any]] = {
    "atfm": {},
    "atfm-no-sf": {"alpha": 0.0},
    "sfm": {"source": "normal"},
    "sfm-no-sf": {"source": "normal", "alpha": 0.0},
    "cfm": {"source": "normal", "alpha": 0.0, "experts": "one", "signed": True, "condition_dropout": 0.5,
            "guidance": 0.3, "batch_size": 64, "images_per_pass": 2, "solver": "midpoint", "steps": 100},
}
# CFM by its recipe for MMIS and at its network's width; that network's dropout of 0.1 is left out.
FLOWS["cfm-mmis"] = FLOWS["cfm"] | {"dim": 64, "dim_mults": (1, 2, 4, 4), "batch_size": 24,
                                    "num_epochs": 500, "lr": 1e-4, "ema": 0.9999, "images_per_pass": 8}
# The systems that they compare with: the class in models/baselines, and how its paper trains it at full size.
_UNET = {"experts": "one", "dim": 32, "dim_mults": (1, 2, 4, 6)}
_DIFFUSION = {"experts": "one", "dim": 32, "dim_mults": (1, 2, 4), "schedule": "cosine", "ema": 0.9999}
BASELINES: dict[str, tuple[str, dict[str, Any]]] = {
    "ssn": ("ssn:SSN", {**_UNET, "lr": 1e-3, "batch_size": 12}),
    "prob-unet": ("prob_unet:ProbUNet", {**_UNET, "lr": 1e-4, "batch_size": 12}),
    "prob-unet-energy": ("prob_unet:EnergyProbUNet", {**_UNET, "experts": "all", "lr": 1e-4,
                                                      "batch_size": 12}),  # a control
    "phiseg": ("phiseg:PHiSeg", {**_UNET, "dim_mults": (1, 2, 4, 6, 6, 6, 6), "lr": 1e-3, "batch_size": 12}),
    "mose": ("mose:MoSE", {**_UNET, "experts": "all", "lr": 1e-3, "batch_size": 16, "weight_decay": 1e-5}),
    "ccdm": ("ccdm:CCDM", {**_DIFFUSION, "lr": 1e-4, "batch_size": 16}),
    "ab": ("analog_bits:AnalogBits", {**_DIFFUSION, "lr": 1e-4, "batch_size": 16}),
    "cimd": ("cimd:CIMD", {**_UNET, "dim": 128, "dim_mults": (1, 2, 4), "lr": 1e-4, "batch_size": 20}),
    "flow-ssn": ("flow_ssn:FlowSSN", {**_UNET, "lr": 1e-4, "batch_size": 32, "ema": 0.9999, "clip": 10.0}),
    "c-ssn": ("conditioned:ConditionedSSN", {**_UNET, "lr": 1e-4, "batch_size": 6, "weight_decay": 1e-4}),
    "c-prob-unet": ("conditioned:ConditionedProbUNet", {**_UNET, "lr": 1e-4, "batch_size": 6,
                                                        "weight_decay": 1e-4}),
}
METHODS = (*FLOWS, *BASELINES)
CONTROLS = ("act-gtr-emptied",)  # GTR's samples, simply post-processed

AMP = ("products of ST-Net in bfloat16; auto: on a GPU that has it, not on a CPU; False: the paper's "
       "float32, in which all else is always")
AMP_CHOICES = ("auto", "True", "False")
LAYOUT = "ST-Net in the layout that CUDA's convolutions are fastest in; with --compile only"
COMPILE = "torch.compile ST-Net: minutes at the start, faster from then on"


def setting(default: Any, why: str, allowed: str | tuple[str, ...] = "(-inf, inf)", *,
            flags: tuple[str, ...] = (), path: bool = False, size: bool = False) -> Any:
    """A dataclass field that is also a flag: its default, the reason for it, and the values it may take.

    allowed: its choices, or the interval of a number; a round bracket leaves the end out. flags: how it is
    spelt on the command line, if not as the field. path: a leading ~ is the home folder. size: of an
    experiment, such as its number of epochs; another value is still the same method, see `models.flags`."""
    choices, within = ((), allowed) if isinstance(allowed, str) else (allowed, "(-inf, inf)")
    return field(default=default, metadata={"why": why, "choices": choices, "flags": flags, "within": within,
                                            "path": path, "size": size})


def count(default: Any, why: str, **others: Any) -> Any:
    """A `setting` that is a number of things, at least one, and a size of the experiment."""
    return setting(default, why, "[1, inf)", size=True, **others)


class Config:
    """Settings. A field holds one of its choices, or a number within its interval; a tuple holds such."""

    def __post_init__(self) -> None:
        """Raises ValueError, naming the flag, for another value."""
        for setting_ in fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            value, choices = getattr(self, setting_.name), setting_.metadata.get("choices")
            interval = setting_.metadata.get("within")
            if choices and isinstance(value, bool):  # in older checkpoints, of what is a choice now
                value = str(value)
                object.__setattr__(self, setting_.name, value)
            for item in value if isinstance(value, tuple) else (value,):
                if choices and item not in choices:
                    raise ValueError(f"{setting_.name}={item!r}: expected one of {', '.join(choices)}")
                if interval and isinstance(item, int | float) and not _within(item, interval):
                    raise ValueError(f"--{setting_.name} {item}: expected a number in {interval}")


def _within(value: float, interval: str) -> bool:
    """Whether a number is in an interval such as "[0, inf)"."""
    low, high = map(float, interval[1:-1].split(","))
    return (low < value or interval[0] == "[" and value == low) and (
        value < high or interval[-1] == "]" and value == high)


@dataclass(frozen=True)
class RunConfig(Config):
    """What all scripts share."""

    output_path: str | None = setting(None, "folder of this experiment (default: runs/<what>)", path=True)
    preset: str = setting("paper", "paper; released: what the authors' code does; best: ours, what did "
                                   "better on real images at small size, see docs/results.md", PRESETS)
    trained_as: str = "custom"  # the preset that a training step's settings are those of, see `models.flags`
    seed: int = setting(0, "seed of initialization and of every step's randomness", "[0, 4294967295]")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, ...; auto takes CUDA when there is one")
    tf32: bool = setting(True, "on CUDA, convolutions of factors rounded to 10 bits: much faster")
    deterministic: bool = setting(False, "repeat runs bit for bit on CUDA too, slower")


@dataclass(frozen=True)
class Metadata(Config):
    """A dataset: what it holds (facts, checked against the files), then where it is and how it is used."""

    what: str = "LIDC"
    reader: str = "lidc"  # format of the original: lidc, isic3, mmis, or cases (of `data.prepare`)
    channels: int = 1  # of the image that GTR sees
    annotators: int = 4  # expert masks per image, k; where images differ, the largest
    size: int = 128  # pixels per side in the files, before `crop`
    axis: str = "fewest"  # that volumes are cut across, and
    window: tuple[float, ...] = ()  # intensities from black to white, as `data.prepare` was told
    data_path: str = setting("", "folder or file of the dataset", path=True)
    split: str = setting("group", "group: 64/16/20 with no patient (LIDC) or image (ISIC3) on two sides; "
                                  "released: the authors' overlapping lists, for comparison; file: as in a "
                                  "file of PHiSeg or CCDM, the folders of MMIS, or yours; group-val, "
                                  "file-val: so, and tested on the validation images, to make choices, or as "
                                  "CFM is on MMIS", ("group", "released", "file", "group-val", "file-val"))
    split_seed: int = setting(0, "seed of the 64/16/20 split; not --seed, so that runs share their test set",
                              "[0, 4294967295]", size=True)
    marked: bool = setting(False, "leave out images that no expert marked, and say how many", size=True)
    limit: int | None = count(None, "use the first N images of each split")
    crop: int | None = count(None, "centre crop to S x S pixels")
    augment: bool = setting(False, "flip, rotate, scale and shear training images together with their masks")
    dihedral: bool = setting(False, "flip and turn them by quarter turns, which makes up no pixels")
    grey: bool = setting(True, "ST-Net sees RGB in grey, as in the released code; False: every channel")

    @property
    def flow_channels(self) -> int:
        """Channels of the image that ST-Net sees."""
        return 1 if self.grey else self.channels

    @property
    def side(self) -> int:
        """Pixels per side of the images that the networks see."""
        return self.crop or self.size


@dataclass(frozen=True)
class OptimizerConfig(Config):
    """How weights are updated, in both steps."""

    lr: float = setting(1e-4, "learning rate of Adam (paper, App. 6)", "(0, inf)", size=True)
    weight_decay: float = setting(0.0, "of AdamW; at 0 (paper) it is Adam; released, GTR: 1e-4", "[0, inf)")
    schedule: str = setting("constant", "of the learning rate: constant (paper), or cosine: falling to 0 at "
                                        "the last step along half a cosine", ("constant", "cosine"))
    clip: float = setting(0.0, "norm that a step's gradient is shortened to if longer; 0: any", "[0, inf)")
    ema: float = setting(0.0, "decay of the weights' average that is validated and used; 0: none", "[0, 1)")


@dataclass(frozen=True)
class GTRConfig(OptimizerConfig):
    """Step 1: training the Gaussian Truncation Representation, Eq. 3-5."""

    epochs: int = count(1000, "passes over the training images (paper, LIDC: 1000; ISIC3: 400)")
    batchsize: int = count(256, "images per step (paper, LIDC: 256; ISIC3: 8)",
                           flags=("--batchsize", "--betchsize"))  # as the authors spell it
    backbone: str = setting("unet", "network that gives GTR's features, see models/gtr.py")
    num_filters: tuple[int, ...] = count((32, 64, 128, 192), "filters per U-Net level (paper, App. 6)")
    rank: int = count(10, "columns of the covariance factor D, r (paper, App. 6)")
    convs: int = setting(2, "convolutions per block (paper: 2; released: 3)", "[1, inf)")
    pool: str = setting("max", "paper: max; released: avg", ("max", "avg"))
    up: str = setting("transposed", "paper: transposed convolution; released: bilinear",
                      ("transposed", "bilinear"))
    loss: str = setting("nll", "nll: Monte Carlo likelihood (Eq. 5); energy: Eq. 5 first, then the energy "
                               "score under 1 - IoU, see models/energy.py", ("nll", "energy"))
    nll_first: float = setting(0.3, "fraction of steps with Eq. 5 before --loss energy takes over", "[0, 1]")
    temperature: float = setting(1.0, "multiplies the standard deviations of samples (Eq. 3: 1)", "(0, inf)")
    tta: bool = setting(False, "test-time augmentation: each sample's image is flipped and turned")
    mc_samples: int = setting(20, "samples per image and step; Eq. 5's M: 10 and their negatives", "[1, inf)")
    experts: str = setting("one", "one: a random expert per image and step (released); all: the likelihood "
                                  "under each, averaged", ("one", "all"))


@dataclass(frozen=True)
class Objective(Config):
    """What the flow learns (Algorithm 1), from which x_0 and by which loss, and how it samples."""

    source: str = setting("gtr", "x_0: a sample of GTR, or standard normal noise, see models/sources.py")
    experts: str = setting("all", "all annotators of an image per step, or one at random", ("all", "one"))
    signed: bool = setting(False, "the flow's masks are -1 / 1 rather than 0 / 1 (CFM)")
    condition_dropout: float = setting(0.0, "fraction of training images set to 0 (CFM: 0.5)", "[0, 1]")
    guidance: float = setting(0.0, "w in (1 + w) v(image) - w v(zeros) when sampling (CFM: 0.3)")
    alpha: float = setting(1e-3, "weight of semantic term L_SF (paper: LIDC 1e-3, ISIC3 1e-4)", "[0, inf)")
    dice: str = setting("soft", "soft: Dice with a gradient; thresholded: the released code's, without",
                        ("soft", "thresholded"))
    dice_over: str = setting("image", "one Dice per image, or one over the batch (released), of which each "
                                      "of several processes takes its part", ("image", "batch"))
    semantic_target: str = setting("own", "compare x_1^t with its path's mask, or with all", ("own", "all"))
    solver: str = setting("euler", "of the ODE in testing (paper: euler; CFM: midpoint)", size=True)
    steps: int = count(25, "solver steps in testing (paper: 25; released ISIC3 test script: 50; CFM: 100)")

    @property
    def per_annotator_loss(self) -> bool:
        """Whether the loss on the path to an annotator's mask does not depend on the others' masks."""
        return self.semantic_target == "own"


def stage_folder(stage: str, preset: str, alpha: float | None = None) -> str:
    """Name of the folder of a step, GTR or a method; presets share none. alpha: of one of several flows."""
    name = stage if preset == "paper" else f"{stage}-{preset}"
    return name if alpha is None else f"{name}_alpha_{alpha:g}"


@dataclass(frozen=True)
class FlowConfig(Objective, OptimizerConfig):
    """Step 2: training the flow, whose velocity is ST-Net, from the frozen GTR, Algorithm 1."""

    method: str = setting("atfm", "the system to train; it sets other settings", METHODS)
    gtr: str | None = setting(None, "folder or checkpoint of step 1 (default: <output_path>/GTR)", path=True)
    num_epochs: int = count(200, "passes over the training images (paper, LIDC: 200; ISIC3: 120)")
    batch_size: int = count(6, "images per step, each with all its annotators (paper, LIDC: 6; ISIC3: 1)")
    alphas: tuple[float, ...] = setting((), "a flow per alpha, each in its folder", "[0, inf)", size=True)
    network: str = setting("st-net", "network of the flow, see models/st_net.py")
    dim: int = count(128, "width of ST-Net (LIDC: 128; released ISIC3 script: 256)")
    dim_mults: tuple[int, ...] = count((1, 2, 4), "width multipliers per level (App. 6)")
    weight_standardization: str = setting("standard", "standard: divide by the standard deviation (arXiv "
                                                      "1903.10520); released: multiply by it; none",
                                          ("standard", "released", "none"))
    time_scale: float = setting(1000.0, "t times this is embedded by sinusoids (released: 1)", "(0, inf)")
    annotators_per_pass: int = count(1, "annotators per forward and backward pass: the gradients add up to "
                                        "those of all k at once, the memory is that of one pass")
    images_per_pass: int | None = count(None, "images per pass, as annotators_per_pass (default: all)")
    recompute: bool = setting(False, "gradient checkpointing in ST-Net", flags=("--checkpoint",), size=True)
    amp: str = setting("auto", AMP + "; a run that goes on stays as it began", AMP_CHOICES, size=True)
    channels_last: bool = setting(False, LAYOUT, size=True)
    compile: bool = setting(False, COMPILE, size=True)

    def folder(self, preset: str) -> str:
        """Name of the folder that this flow is trained into, with its alpha if it is one of several."""
        return stage_folder(self.method, preset, self.alpha if self.alphas else None)

    def per_alpha(self) -> "list[FlowConfig]":
        """The flows to train: this one, or one for each of `alphas`."""
        return [replace(self, alpha=alpha) for alpha in self.alphas] or [self]


@dataclass(frozen=True)
class LoopConfig(Config):
    """The training loop, the same for both steps."""

    save_model: bool = setting(True, "write checkpoints; False: train and validate only")
    save_model_step: int = count(50, "keep every N-th epoch's checkpoint besides the last and the best")
    skip_nonfinite: bool = setting(False, "leave out and count batches whose loss or gradient is not finite")
    validate_every: int = count(5, "epochs between validations; the last epoch is always validated")
    val_images: int = count(32, "held-out images per validation, evenly spaced over the validation split")
    val_samples: int = count(16, "samples per image in a validation")
    val_steps: int = count(10, "Euler steps in a validation of the flow: enough to rank checkpoints")


@dataclass(frozen=True)
class EvaluationConfig(Config):
    """Testing: sampling and scoring held-out images with the models of both steps."""

    gtr: str | None = setting(None, "folder or checkpoint of step 1 (default: <output_path>/GTR)", path=True)
    prior: str | None = setting(None, "folder or checkpoint of step 2 (default: <output_path>/<method>)",
                                path=True)
    methods: tuple[str, ...] = setting(
        ("act-gtr", "atfm"), "systems; act-gtr: GTR's samples, no flow; -emptied: a control, see "
        "metrics/controls.py; others: docs/results.md; with -best or -released at the end: trained under "
        "that preset", flags=("--methods", "--method"))
    solver: tuple[str, ...] = setting((), "solvers of the flow's ODE, a row each (default: the checkpoint's)")
    steps: tuple[int, ...] = count((), "numbers of solver steps, a row each (default: the checkpoint's)")
    alphas: tuple[float, ...] = setting((), "flows trained with --alphas, a row each", "[0, inf)")
    samples: tuple[int, ...] = count((16, 32, 100), "n of GED_n, HM-IoU_n, MDM_n (paper: 16, 32, 100)")
    seeds: tuple[int, ...] = setting((0, 1, 2, 3, 4), "a run of sampling each (paper: 5)", "[0, 4294967295]")
    batch_size: int | None = count(None, "states x_t integrated at once; bounds memory (default: 8 on a CPU, "
                                         "on a GPU 64 of 128x128 pixels, fewer if memory does not suffice)")
    amp: str = setting("auto", AMP, AMP_CHOICES)
    channels_last: bool = setting(False, LAYOUT)
    compile: bool = setting(False, COMPILE)
    released_checkpoint: bool = setting(False, "--gtr and --prior are files of weights of the authors' code")
    part: str = setting("1/1", "i/m: test every m-th image from the i-th; then without --part: the table")
    report_images: int = setting(100, "images in report.html, evenly spaced over GED", "[0, inf)")
    images: tuple[str, ...] = setting((), "draw samples for these image files instead of testing", path=True)
    allow_overlap: bool = setting(False, "test even if test images were trained on (as in split released)")

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.part_of_images  # checked at once
        for name in ("methods", "solver", "steps", "alphas", "samples", "seeds"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ValueError(f"--{name} {' '.join(map(str, values))}: a value comes twice, which would "
                                 "give the same again; expected different ones")

    @property
    def part_of_images(self) -> tuple[int, int]:
        """i - 1 and m of `part`. Raises ValueError for what is not i/m."""
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", self.part)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise ValueError(f"--part {self.part}: expected i/m, such as 1/4, with i from 1 to m")
        return int(match[1]) - 1, int(match[2])


@dataclass(frozen=True)
class Experiment:
    """A dataset with the settings of each step on it."""

    metadata: Metadata
    gtr: GTRConfig = GTRConfig()
    flow: FlowConfig = FlowConfig()
    loop: LoopConfig = LoopConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    run: RunConfig = RunConfig()
    small: bool = False  # for a CPU
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)  # a method's changes of `flow` only here


LIDC_DEMO = Experiment(  # minutes on a CPU
    Metadata("LIDC_demo", size=64, crop=32),
    gtr=GTRConfig(epochs=20, batchsize=8, lr=1e-3, num_filters=(16, 32, 64)),
    flow=FlowConfig(num_epochs=5, batch_size=8, experts="one", lr=2e-3, ema=0.99, dim=8, steps=4),
    loop=LoopConfig(validate_every=5, val_samples=8, val_steps=4),
    evaluation=EvaluationConfig(samples=(16,), seeds=(0,), report_images=24),
    small=True,
)
EXPERIMENTS = {
    # CFM's 100,000 iterations: 151 steps of batch 64 an epoch, of 9,661 training slices.
    "LIDC": Experiment(Metadata(), methods={"cfm": {"num_epochs": 663}}),
    "isic3_style_concat": Experiment(
        Metadata("isic3_style_concat", reader="isic3", channels=3, annotators=3, size=256, augment=True),
        gtr=GTRConfig(epochs=400, batchsize=8),
        flow=FlowConfig(num_epochs=120, batch_size=1, dim=256, alpha=1e-4),
        # Few training images, so that LIDC's validation would take 37 % of the time; this takes 6 %.
        loop=LoopConfig(val_images=16, val_samples=8, val_steps=4),
    ),
    "MMIS": Experiment(Metadata("MMIS", reader="mmis", channels=3, split="file", grey=False),
                       evaluation=EvaluationConfig(samples=(15,))),  # CFM's M
    "LIDC_demo": LIDC_DEMO,
    "isic3_demo": replace(
        LIDC_DEMO,
        metadata=Metadata("isic3_demo", reader="isic3", channels=3, annotators=3, size=64, crop=48,
                          augment=True),
        gtr=replace(LIDC_DEMO.gtr, epochs=15),
        flow=replace(LIDC_DEMO.flow, num_epochs=6, alpha=1e-4),
        loop=replace(LIDC_DEMO.loop, validate_every=6),
    ),
}


def released(base: Experiment) -> Experiment:
    """The authors' code as it runs, the preset `released`: see docs/deviations.md."""
    return replace(
        base,
        metadata=replace(base.metadata, split="released"),
        gtr=replace(base.gtr, convs=3, pool="avg", up="bilinear", weight_decay=1e-4),
        flow=replace(base.flow, weight_standardization="released", time_scale=1.0, dice="thresholded",
                     dice_over="batch", steps=50 if base.metadata.reader == "isic3" else 25),
        evaluation=replace(base.evaluation, allow_overlap=True),
    )


def best(base: Experiment) -> Experiment:
    """Ours, what did best on validation patients at small size: docs/results.md.

    GTR is trained by the energy score of its samples under 1 - IoU, of which GED is made, and samples more
    narrowly than its Gaussian, from flipped and turned images. Both steps flip and turn images, average
    weights and lower the rate. The flow takes one expert a step, and as many more steps as experts."""
    gtr = replace(base.gtr, loss="energy", mc_samples=16, ema=0.99, schedule="cosine", temperature=0.8,
                  tta=True)
    flow = replace(base.flow, steps=2, schedule="cosine", clip=1.0, weight_standardization="none",
                   time_scale=10.0)
    if flow.experts == "all":
        flow = replace(flow, experts="one", num_epochs=flow.num_epochs * base.metadata.annotators, ema=0.999)
    return replace(base, metadata=replace(base.metadata, dihedral=True), gtr=gtr, flow=flow)


def dataset(what: str) -> Metadata:
    """A data set of EXPERIMENTS, at the path of the environment or PATHS; ValueError for another name."""
    if what not in EXPERIMENTS:
        raise ValueError(f"--what {what}: unknown dataset; expected one of {', '.join(EXPERIMENTS)}, or an "
                         ".h5 file of your own cases, by data.prepare")
    path = os.environ.get(f"ATFM_{what.upper()}_PATH") or PATHS[what]
    return replace(EXPERIMENTS[what].metadata, data_path=os.path.expanduser(path))


def experiment(what: str, preset: str = "paper", method: str | None = None) -> Experiment:
    """The settings of a data set or file, by `models.flags`; late, as that module imports this one."""
    return importlib.import_module("models.flags").experiment(what, preset, method)
