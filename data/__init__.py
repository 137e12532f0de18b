"""Images with several expert masks each: one file per format, one on-disk layout, one dataset class.

data.load("LIDC", "train")[i] -> (image (c, h, w) float32 in [0, 1], masks (k, h, w) float32 of 0/1)

What comes from outside is checked in one place each, here and in the other packages:

settings, their choices and ranges          metadata_manager.Config
which format an original has                data.readers
which files of a folder count, their names  data.convert.files_in
pickles                                     data.safe_pickle.read_pickle, then data.lidc
image files                                 data.images.decoded; of ISIC3 then data.isic3
image and mask files of any kind            data.volumes.read_scan; with each other: data.cases.read
which masks belong to which image           data.cases.find
HDF5 files                                  data.store.reading, stored_dataset; of PHiSeg and MMIS then
                                            data.phiseg, data.mmis
DICOM files and contours                    data.prepare_lidc
checkpoints                                 models.checkpoint.load, fill
images or patients that were trained on     models.loading.refuse_overlap
masks and probabilities to be scored        metrics.overlap, metrics.maps
files that are written                      metrics.files.whole_file; over what exists:
                                            data.writer.refuse_foreign
paths of flags, errors, terminals           metrics.program
"""

from metrics.program import name_user

name_user()  # torchvision and torch.compile ask for it where they are imported

from data.dataset import ExpertDataset, load
from data.loader import Loader, augment, augmentations, dihedral
from data.writer import Writer

__all__ = ["ExpertDataset", "Loader", "Writer", "augment", "augmentations", "dihedral", "load"]
