#!/usr/bin/env python3
"""Fine-tune a GPT.

    deepspeed examples/finetune_gpt.py --task SST-2 --base runs/a --train-file train.tsv --valid-file dev.tsv

On completions or as a classifier, from a checkpoint of ours or a folder of transformers, in any layout. `--help`
explains every setting; docs/finetuning.md has a command for each format.
"""

import sys

from megagpt.finetune.start import finetune

if __name__ == "__main__":
    finetune(sys.argv[1:])
