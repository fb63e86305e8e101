"""megagpt: train GPTs with tensor, pipeline and data parallelism. Start reading at megagpt/train/loop.py."""

__version__ = "0.1.0"
