"""How attention is computed: an implementation is a file here, and a line of IMPLEMENTATIONS. No torch here."""

from __future__ import annotations

from megagpt.model.attention.blocks import Blocks
from megagpt.model.attention.flex import Flex
from megagpt.model.attention.implementation import Implementation
from megagpt.model.attention.sdpa import Sdpa
from megagpt.model.attention.steps import Steps

IMPLEMENTATIONS: dict[str, Implementation] = {
    "sdpa": Sdpa(),
    "flex": Flex(),
    "blocks": Blocks(),
    "softmax": Steps(),
    "reference": Steps(),  # around the plain softmax: `Kernels` sees to that
}
