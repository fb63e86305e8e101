#!/usr/bin/env python3
"""Loss, perplexity and bits per byte of a trained model on a split of a dataset.

    python examples/evaluate.py --load runs/a
    python examples/evaluate.py --load runs/a --data-path other_text_document --split 0,1,0

Without --data-path it reads the validation split that the run itself was validated on, whole.
Several processes (torchrun --nproc-per-node 2 …) share a large model by tensor parallelism or --pp stages;
--dp replicas share out the split.
"""

import sys
from dataclasses import asdict

from rich.console import Console
from rich.progress import Progress

from megagpt.config.values import Split
from megagpt.data.indexed.dataset import IndexedDataset
from megagpt.data.tokenizers.tokenizer import other_tokenizer
from megagpt.errors import ArgumentParser, UserError, home_expanded, run_cli
from megagpt.evaluate.split import SPLITS, evaluate
from megagpt.files import json_text
from megagpt.generate.flags import add_load_flags, open_from


def main() -> None:
    """Print one JSON object per dataset."""
    parser = ArgumentParser(description=__doc__)
    add_load_flags(parser)
    parser.add_argument(
        "--data-path", type=home_expanded, help="prefix of an indexed dataset (default: those of the run)"
    )
    parser.add_argument("--split", type=Split.parse, help="shares for train, validation, test (default: the run's)")
    parser.add_argument("--which", choices=SPLITS, default="validation", help="the share to read (default: validation)")
    parser.add_argument("--max-tokens", type=int, help="stop after so many tokens (default: read all)")
    a = parser.parse_args()
    with open_from(a) as trained:
        data, speaks = trained.config.data, trained.mesh.rank == 0
        prefixes = [a.data_path] if a.data_path else data.data_path.prefixes
        if not prefixes:
            raise UserError(f"{a.load} names no data that it was trained on; give --data-path")
        for prefix in prefixes:
            dataset = IndexedDataset(prefix)
            if speaks and (note := other_tokenizer(trained.tokenizer, dataset.meta)):
                print(f"note: {prefix}: {note}", file=sys.stderr)
            with Progress(*Progress.get_default_columns(), console=Console(stderr=True), disable=not speaks) as bar:
                task = bar.add_task("tokens", total=None)
                result = evaluate(
                    trained,
                    dataset,
                    split=a.split or data.split,
                    which=a.which,
                    max_tokens=a.max_tokens,
                    progress=lambda done, total, task=task, bar=bar: bar.update(task, completed=done, total=total),
                )
            if speaks:
                print(json_text({"data_path": prefix, "split": a.which, "step": trained.step, **asdict(result)}))


if __name__ == "__main__":
    run_cli(main)
