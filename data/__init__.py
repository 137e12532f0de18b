"""Images with several expert masks each: one file per format, one on-disk layout, one dataset class.

data.load("LIDC", "train")[i] -> (image (c, h, w) float32 in [0, 1], masks (k, h, w) float32 of 0/1)
"""

from metrics.program import name_user

name_user()  # torchvision, which is imported below, asks for the user's name

from data.dataset import ExpertDataset, load
from data.loader import Loader, augment, augmentations, dihedral
from data.writer import Writer

__all__ = ["ExpertDataset", "Loader", "Writer", "augment", "augmentations", "dihedral", "load"]
