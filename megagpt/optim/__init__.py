"""The optimizers: a kind is a file here, and a line of OPTIMIZERS. No torch to read what they keep."""

from megagpt.optim.adafactor import Adafactor, Unfactored
from megagpt.optim.adam import Adam, AdamW
from megagpt.optim.ademamix import AdEMAMix
from megagpt.optim.lion import Lion
from megagpt.optim.muon import Muon
from megagpt.optim.update import Update

OPTIMIZERS: dict[str, Update] = {
    "adamw": AdamW(),
    "adam": Adam(),
    "adafactor": Adafactor(),
    "adafactor_unfactored": Unfactored(),
    "lion": Lion(),
    "muon": Muon(),
    "ademamix": AdEMAMix(),
}
