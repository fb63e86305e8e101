"""Fine-tuning by the machinery of pretraining: another source for the loop, and what it begins with.

start.py: the command. base.py: the weights to begin with. task.py: what a task says; completion.py, glue.py: the kinds.
example.py, packing.py, rows.py: from a file's lines to micro-batches. source.py: what the loop reads and is judged by.
scores.py: GLUE's metrics. result.py: what a run leaves beside its checkpoints.
"""
