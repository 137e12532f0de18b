"""What GED consists of, by the size of what experts mark, and how often nothing is marked: tables of a test.

GED_n = 2 E d(s, y) - E d(s, s') - E d(y, y') (App. 7): twice the distance of samples from experts, minus the
diversities of both. A sampler that never draws an empty mask, or always, loses by the first.
"""

from collections.abc import Mapping

import numpy as np

THIRDS = ("smallest third", "middle third", "largest third")
PARTS = ("Distance", "Diversity", "Experts' diversity")
Scores = Mapping[str, np.ndarray]  # name -> (seeds, images)


def thirds(sizes: np.ndarray) -> dict[str, np.ndarray]:
    """Name -> indices of the images (size: mean pixels over experts) in three parts of equal number."""
    return dict(zip(THIRDS, np.array_split(np.argsort(sizes, kind="stable"), 3)))


def parts_of(scores: Scores, n: int, images: np.ndarray) -> dict[str, float]:
    """Means over some images of GED_n and of its parts; n: of all samples drawn."""
    names = {f"GED{n}": f"GED{n}"} | {part: part for part in PARTS} | {"Diversity": f"Diversity{n}"}
    return {name: float(scores[of][:, images].mean()) for name, of in names.items()}


def empty_correlation(scores: Scores) -> float:
    """Over images, of the shares of empty samples and of empty experts' masks; nan if one is constant."""
    ours, theirs = scores["Empty"].mean(0), scores["Experts empty"].mean(0)
    if ours.std() == 0 or theirs.std() == 0:
        return float("nan")
    return float(np.corrcoef(ours, theirs)[0, 1])


def correlation_text(scores: Scores) -> str:
    """`empty_correlation` with its sign, or - where it is not defined."""
    correlation = empty_correlation(scores)
    return "-" if np.isnan(correlation) else f"{correlation:+.2f}"


def empty_table(systems: Mapping[str, Scores]) -> str:
    """Markdown: how often a sample marks nothing, how often an expert, and whether on the same images."""
    lines = ["| share of empty masks | samples | experts | correlation over images |", "|---|---|---|---|"]
    for label, scores in systems.items():
        lines.append(f"| {label} | {scores['Empty'].mean():.3f} | "
                     f"{scores['Experts empty'].mean():.3f} | {correlation_text(scores)} |")
    return "\n" + "\n".join(lines) + "\n"


def parts_table(systems: Mapping[str, Scores], n: int) -> str:
    """Markdown: GED_n and its parts for each system, over all images and by the size of what is marked."""
    lines = [f"| by size | images | GED{n} | {' | '.join(PARTS)} |", "|---" * (len(PARTS) + 3) + "|"]
    for label, scores in systems.items():
        sizes = scores["Size"].mean(0)
        for name, images in {"all": np.arange(len(sizes)), **thirds(sizes)}.items():
            if len(images):
                about = f", {sizes[images].min():.0f} to {sizes[images].max():.0f} px"
                values = " | ".join(f"{value:.3f}" for value in parts_of(scores, n, images).values())
                lines.append(f"| {label}, {name}{about} | {len(images)} | {values} |")
    return "\n" + "\n".join(lines) + "\n"
