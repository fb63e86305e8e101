"""megagpt: train GPTs with tensor, pipeline and data parallelism. Start reading at megagpt/train.py."""

__version__ = "0.1.0"
