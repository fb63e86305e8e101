"""Imported for its imports, by the fork server of processes/local.py: all that DeepSpeed would import at a start.

ZeRO imports its Muon, and with that torch's compiler, at each start: 4 s a rank.
"""

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
