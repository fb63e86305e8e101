#!/usr/bin/env python3
"""Let a trained model write.

    python examples/generate.py --load runs/a --prompt "def main():"

Several processes (torchrun --nproc-per-node 2 …) share a large model by tensor parallelism.
"""

from megagpt.errors import ArgumentParser, home_expanded, run_cli
from megagpt.generate.sample import complete
from megagpt.generate.trained import open_trained


def main() -> None:
    """Print the prompt and its continuation."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "--load", required=True, type=home_expanded, help="run folder, RUN@best, RUN@STEP, or checkpoint folder"
    )
    parser.add_argument("--load-fallback", action="store_true", help="where it is damaged, take the one before it")
    parser.add_argument("--weights", choices=("last", "ema"), default="last", help="ema: their moving average")
    parser.add_argument("--prompt", default="def ", help='text to go on from (default: "def ")')
    parser.add_argument("--n-tokens", type=int, default=120, help="tokens to write at most (default: 120)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest each time (default: 0.8)")
    parser.add_argument("--top-k", type=int, default=50, help="draw among the k likeliest; 0: among all (default: 50)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws (default: 0)")
    a = parser.parse_args()
    with open_trained(a.load, a.load_fallback, a.weights) as trained:
        text = complete(trained, a.prompt, n_tokens=a.n_tokens, temperature=a.temperature, top_k=a.top_k, seed=a.seed)
        if trained.mesh.rank == 0:
            print(f"--- {trained.folder}, {trained.step} steps\n{text}")


if __name__ == "__main__":
    run_cli(main)
