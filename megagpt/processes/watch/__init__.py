"""The watch over the ranks of a run: watch.py is what the program uses, judge.py what decides."""
