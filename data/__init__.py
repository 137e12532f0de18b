"""Images with several expert masks each: one file per format, one on-disk layout, one dataset class.

data.load("LIDC", "train")[i] -> (image (c, h, w) float32 in [0, 1], masks (k, h, w) float32 of 0/1)
"""

from metrics.program import name_user

name_user()  # torchvision and torch.compile ask for it where they are imported

from data.dataset import ExpertDataset, load
from data.loader import Loader, augment, augmentations, dihedral
from data.writer import Writer

__all__ = ["ExpertDataset", "Loader", "Writer", "augment", "augmentations", "dihedral", "load"]
