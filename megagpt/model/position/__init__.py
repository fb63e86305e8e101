"""Where tokens stand: a kind of position is a file here, and a line of POSITIONS. No torch here."""

from megagpt.model.position.alibi import Alibi
from megagpt.model.position.kind import Position
from megagpt.model.position.learned import Learned
from megagpt.model.position.nope_by_layer import NopeByLayer
from megagpt.model.position.rotary import Rotary
from megagpt.model.position.sinusoidal import Sinusoidal
from megagpt.model.position.t5 import T5
from megagpt.model.position.transformer_xl import TransformerXL

POSITIONS: dict[str, type[Position]] = {
    "learned": Learned,
    "sinusoidal": Sinusoidal,
    "rotary": Rotary,
    "alibi": Alibi,
    "transformer_xl": TransformerXL,
    "t5": T5,
    "none": Position,
    "nope_by_layer": NopeByLayer,
}
