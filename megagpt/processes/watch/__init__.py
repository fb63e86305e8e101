"""The watch over the ranks: watch.py is what the program uses, host.py hears those of a machine, judge.py decides."""
