#!/usr/bin/env python3
"""Loss, perplexity and bits per byte of a trained model on a split of a dataset.

    python examples/evaluate.py --load runs/a
    python examples/evaluate.py --load runs/a --data-path other_text_document --split 0,1,0

Without --data-path it reads the validation split that the run itself was validated on, whole.
Several processes (torchrun --nproc-per-node 2 …) share a large model by tensor parallelism.
"""

import json
from dataclasses import asdict

from rich.console import Console
from rich.progress import Progress

from megagpt.config.values import Split
from megagpt.data.indexed.dataset import IndexedDataset
from megagpt.errors import ArgumentParser, UserError, home_expanded, run_cli
from megagpt.evaluate.split import SPLITS, evaluate
from megagpt.generate.trained import open_trained


def main() -> None:
    """Print one JSON object per dataset."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "--load", required=True, type=home_expanded, help="run folder, RUN@best, RUN@STEP, or checkpoint folder"
    )
    parser.add_argument("--load-fallback", action="store_true", help="where it is damaged, take the one before it")
    parser.add_argument("--weights", choices=("last", "ema"), default="last", help="ema: their moving average")
    parser.add_argument(
        "--data-path", type=home_expanded, help="prefix of an indexed dataset (default: those of the run)"
    )
    parser.add_argument("--split", type=Split.parse, help="shares for train, validation, test (default: the run's)")
    parser.add_argument("--which", choices=SPLITS, default="validation", help="the share to read (default: validation)")
    parser.add_argument("--max-tokens", type=int, help="stop after so many tokens (default: read all)")
    a = parser.parse_args()
    with open_trained(a.load, a.load_fallback, a.weights) as trained:
        data, speaks = trained.config.data, trained.mesh.rank == 0
        prefixes = [a.data_path] if a.data_path else data.data_path.prefixes
        if not prefixes:
            raise UserError(f"{a.load} names no data that it was trained on; give --data-path")
        for prefix in prefixes:
            with Progress(*Progress.get_default_columns(), console=Console(stderr=True), disable=not speaks) as bar:
                task = bar.add_task("tokens", total=None)
                result = evaluate(
                    trained,
                    IndexedDataset(prefix),
                    split=a.split or data.split,
                    which=a.which,
                    max_tokens=a.max_tokens,
                    progress=lambda done, total, task=task, bar=bar: bar.update(task, completed=done, total=total),
                )
            if speaks:
                print(json.dumps({"data_path": prefix, "split": a.which, "step": trained.step, **asdict(result)}))


if __name__ == "__main__":
    run_cli(main)
