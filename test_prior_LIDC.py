"""Test ATFM on LIDC: the paper's scores on the test split, into runs/LIDC/test.

python test_prior_LIDC.py
python test_prior_LIDC.py --methods act-gtr atfm --steps 10 25 --samples 16 32 100 --seeds 0 1 2 3 4

The paper's row stands below ours in the table that it prints. All flags: --help.
"""

from models.testing import test_prior

if __name__ == "__main__":
    test_prior("LIDC")
