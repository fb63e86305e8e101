"""The MLP of a block: a kind of its matrices is a file here, and a line of MLPS. No torch to read what they declare."""

from megagpt.model.mlp.butterfly import Butterfly
from megagpt.model.mlp.kind import Dense
from megagpt.model.mlp.low_rank import LowRank
from megagpt.model.mlp.monarch import Monarch

MLPS: dict[str, type[Dense]] = {
    "dense": Dense,
    "low_rank": LowRank,
    "butterfly": Butterfly,
    "monarch": Monarch,
}
