"""ATFM's models. The glossary, for code, docstrings and README alike:

b batch, n samples per image, k annotators (experts) per image, r rank, h w image size, m Monte Carlo samples;
t      time in [0, 1]
x_0    a sample of the truncation distribution, the source of the flow (t = 0)
x_1    an annotator's mask, the target of the flow (t = 1)
x_t    (1 - t) x_0 + t x_1, the state at time t
u      x_1 - x_0, the target velocity;  v: the predicted one
x_1^t  x_t + (1 - t) v, the mask predicted from time t (`endpoint`)
mu, D, L   mean, covariance factor and covariance diagonal of the truncation distribution
alpha  weight of the semantic term L_SF
"""

from models import checkpoint
from models.atfm import ATFM
from models.baselines import baseline
from models.energy import energy_score
from models.gtr import GTR, LowRankGaussian, monte_carlo_nll
from models.loading import describe, flow_of, load_flow, load_gtr
from models.released import load_released
from models.run import Validation
from models.st_net import STNet
from models.systems import load_systems
from models.training import settle_precision, train_loop

__all__ = ["ATFM", "GTR", "LowRankGaussian", "STNet", "Validation", "baseline", "checkpoint", "describe",
           "energy_score", "flow_of", "load_flow", "load_gtr", "load_released", "load_systems",
           "monte_carlo_nll", "settle_precision", "train_loop"]
