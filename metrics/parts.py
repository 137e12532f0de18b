"""What GED consists of, by the size of the experts' masks, and how often masks are empty: tables of a test.

GED_n = 2 E d(s, y) - E d(s, s') - E d(y, y') (App. 7): twice the distance of samples from experts, minus the
diversities of both. A sampler that never, or always, draws empty masks loses by the distance.
"""

from collections.abc import Mapping

import numpy as np

from metrics.program import table

THIRDS = ("smallest third", "middle third", "largest third")
PARTS = ("Distance", "Diversity", "Experts' diversity")
Scores = Mapping[str, np.ndarray]  # name -> (seeds, images)


def thirds(sizes: np.ndarray) -> dict[str, np.ndarray]:
    """Name -> indices of the images (size: mean pixels over experts) in three groups of equal number."""
    # stable: images of equal size keep their order, so the groups are the same on every machine.
    return dict(zip(THIRDS, np.array_split(np.argsort(sizes, kind="stable"), 3)))


def parts_of(scores: Scores, n: int, images: np.ndarray) -> dict[str, float]:
    """Means over some images of GED_n and of its parts; n: of all samples drawn."""
    # All three parts are of the same n samples, so that they add up to GED_n.
    columns = {f"GED{n}": f"GED{n}"} | {part: part for part in PARTS} | {"Diversity": f"Diversity{n}"}
    return {name: float(scores[column][:, images].mean()) for name, column in columns.items()}


def correlation_text(scores: Scores) -> str:
    """Correlation over images of the fractions of samples and of experts' masks that are empty.

    "-" if one of the two is constant."""
    samples, experts = scores["Empty"].mean(0), scores["Experts empty"].mean(0)
    # The correlation with a constant would be 0 / 0.
    if samples.std() == 0 or experts.std() == 0:
        return "-"
    return f"{np.corrcoef(samples, experts)[0, 1]:+.2f}"


def empty_table(systems: Mapping[str, Scores]) -> str:
    """Markdown: the fractions of samples and of experts' masks that are empty, and their correlation."""
    return table(("empty masks", "of samples", "of experts", "correlation over images"), [
        (label, f"{scores['Empty'].mean():.3f}", f"{scores['Experts empty'].mean():.3f}",
         correlation_text(scores)) for label, scores in systems.items()])


def parts_table(systems: Mapping[str, Scores], n: int, by_size: bool = True) -> str:
    """Markdown: GED_n and its parts for each system, over all images and by size of the experts' masks."""
    rows = []
    for label, scores in systems.items():
        # Experts' masks are the same under each seed: this mean only removes the axis.
        sizes = scores["Size"].mean(0)
        for name, images in {"all": np.arange(len(sizes)), **(thirds(sizes) if by_size else {})}.items():
            pixels = f"{sizes[images].min():.0f} to {sizes[images].max():.0f} px"
            values = [f"{value:.3f}" for value in parts_of(scores, n, images).values()]
            rows.append([f"{label}, {name}, {pixels}", str(len(images)), *values])
    return table(["parts of GED", "images", f"GED{n}", *PARTS], rows)
