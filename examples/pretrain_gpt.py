#!/usr/bin/env python3
"""Pretrain a GPT.

    deepspeed examples/pretrain_gpt.py --tp 2 --pp 2

With no GPU it brings up the processes it needs on the CPU; with no --data-path it trains on the text of Python's
standard library. `--help` explains every setting.
"""

import sys

from megagpt.train.pretrain import pretrain

if __name__ == "__main__":
    pretrain(sys.argv[1:])
