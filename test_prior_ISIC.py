"""Test ATFM on ISIC3: the paper's scores on the test split, into runs/isic3_style_concat/test.

python test_prior_ISIC.py
python test_prior_ISIC.py --methods act-gtr atfm --steps 10 25 --samples 16 32 100 --seeds 0 1 2 3 4

The paper's row stands below ours in the table that it prints. All flags: --help.
"""

from models.testing import test_prior

if __name__ == "__main__":
    test_prior("isic3_style_concat")
