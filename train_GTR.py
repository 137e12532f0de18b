"""Step 1 of ATFM: train GTR, the Gaussian Truncation Representation (Eq. 3-5), into runs/<what>/GTR.

LIDC:   python train_GTR.py --what LIDC --epochs 1000 --batchsize 256 --save_model True --save_model_step 50
ISIC3:  python train_GTR.py --what isic3_style_concat --epochs 400 --batchsize 8

The same command goes on where it was stopped. Watch with `tensorboard --logdir runs`. All flags: --help.
"""

from models.stages import train_gtr

if __name__ == "__main__":
    train_gtr("LIDC")
