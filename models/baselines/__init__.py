"""Systems of other papers, by the name they have in tables; each file says what its system is."""

from models.baselines.analog_bits import AnalogBits
from models.baselines.ccdm import CCDM
from models.baselines.cimd import CIMD
from models.baselines.flow_ssn import FlowSSN

BASELINES = {"ccdm": CCDM, "ab": AnalogBits, "cimd": CIMD, "flow-ssn": FlowSSN}
