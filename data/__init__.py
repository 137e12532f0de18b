"""Images with several expert masks each: one file per format, one on-disk layout, one dataset class.

data.load("LIDC", "train")[i] -> (image (c, h, w) float32 in [0, 1], masks (k, h, w) float32 of 0/1)
"""

from data.dataset import ExpertDataset, Loader, augment, load
from data.store import Writer

__all__ = ["ExpertDataset", "Loader", "Writer", "augment", "load"]
