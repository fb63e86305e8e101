"""Looking before a run: whether the ranks agree, reach each other, and are fast; `program.py` goes through it."""
