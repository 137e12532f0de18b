"""Step 2 of ATFM on ISIC3: train the flow from the frozen GTR (Algorithm 1), into runs/<what>/atfm.

python train_prior_ISIC.py

The same command goes on where it was stopped. Watch with `tensorboard --logdir runs`. All flags: --help.
"""

from models.stages import train_prior

if __name__ == "__main__":
    train_prior("isic3_style_concat")
