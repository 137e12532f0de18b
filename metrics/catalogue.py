"""Every score of a test, one entry each: what computes it, of how many samples, and where tables show it.

A new score is a function of `Overlaps` (metrics/scores.py) or of blocks of pixels (metrics/maps.py), and an
entry in SCORES: it is then computed, recorded, and shown where its entry says.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from metrics import maps, scores
from metrics.overlap import Block, Overlaps


@dataclass(frozen=True)
class Score:
    """A score of a set of samples against the experts' masks.

    compute: function of `Overlaps`, or with `of_blocks` of a sequence of blocks of pixels -> (b,).
    per_n: computed of the first n samples, for each n of --samples; else of all samples.
    columns: which n tables show: "each", or only the "matching" n, see `matching_n`; "once" for a score
    without n; "" for a score that tables leave out.
    compared: whether the table of differences shows it. better: "lower", "higher", or "" for neither."""

    compute: Callable[[Any], Tensor]
    of_blocks: bool = False
    per_n: bool = False
    columns: str = ""
    compared: bool = False
    better: str = ""


SCORES = {
    "GED": Score(scores.ged_from, per_n=True, columns="each", compared=True, better="lower"),
    "HM-IoU": Score(scores.hm_iou_from, per_n=True, columns="matching", compared=True, better="higher"),
    "MDM": Score(scores.mdm_from, per_n=True, columns="matching", compared=True, better="higher"),
    "Diversity": Score(scores.diversity_from, per_n=True, columns="matching"),
    "S_NCC": Score(maps.s_ncc_from, of_blocks=True, columns="once", better="higher"),
    "Dice of means": Score(maps.dice_of_means_from, of_blocks=True, columns="once", better="higher"),
    "ECE": Score(maps.calibration_error_from, of_blocks=True, columns="once", better="lower"),
    # What `metrics.parts` and `metrics.floor` need.
    "Distance": Score(scores.distance_from),
    "Experts' diversity": Score(scores.experts_diversity_from),
    "Empty": Score(scores.empty_samples_from),
    "Experts empty": Score(scores.empty_experts_from),
    "Size": Score(scores.size_from),
    "Experts": Score(scores.experts_from),
}


def score(samples: Tensor, masks: Tensor, counts: Sequence[int]) -> dict[str, Tensor]:
    """All scores of binary samples (b, n, h, w) against masks (b, k, h, w): name -> (b,).

    counts: the n of scores of the first n samples, such as GED16. Raises ValueError as `Overlaps.of`."""
    return score_blocks([(samples, masks)], counts)


def score_blocks(blocks: Sequence[Block], counts: Sequence[int]) -> dict[str, Tensor]:
    """`score` of masks in blocks of pixels."""
    overlaps = Overlaps.of_blocks(blocks)
    # Overlaps are the costly part: they are computed once, for all n and scores.
    prefixes = {n: overlaps.prefix(n) for n in counts}
    values: dict[str, Tensor] = {}
    for name, entry in SCORES.items():
        if entry.per_n:
            values |= {f"{name}{n}": entry.compute(prefix) for n, prefix in prefixes.items()}
        else:
            values[name] = entry.compute(blocks if entry.of_blocks else overlaps)
    return values


def score_names(counts: Sequence[int]) -> list[str]:
    """The names of all that `score` gives."""
    return [name for entry in SCORES for name in _names(entry, counts)]


def better(name: str) -> str:
    """Which is better of a score by this name, such as GED16: "lower", "higher", or "" for neither."""
    # The n of GED16 is not part of the score's name.
    return SCORES[name.rstrip("0123456789")].better


def matching_n(counts: Sequence[int]) -> int:
    """The n of HM-IoU, MDM and diversity to show: 32, as in the paper, or else the largest."""
    # Tables 1 and 2 of the paper give HM-IoU and MDM for n = 32 alone.
    return 32 if 32 in counts else max(counts)


def columns(counts: Sequence[int], compared: bool = False) -> list[str]:
    """The names of the scores that tables show; compared: those of the table of differences."""
    # A score of all samples has a single column: `_names` looks at no count then.
    shown_n = {"each": counts, "matching": [matching_n(counts)], "once": counts, "": ()}
    return [name for entry, about in SCORES.items() if about.columns and (about.compared or not compared)
            for name in _names(entry, shown_n[about.columns])]


def _names(entry: str, counts: Sequence[int]) -> list[str]:
    return [f"{entry}{n}" for n in counts] if SCORES[entry].per_n else [entry]
