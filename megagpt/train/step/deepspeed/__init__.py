"""All that knows DeepSpeed (0.19.8): its engines behind `train/step/backend.py`, and each workaround with its reason.

backend.py: its plain and its pipeline engine, and what they are kept from. stages.py: its pipeline module. zero.py:
where its ZeRO optimizers keep weights and gradients. settings.py: the dictionary that it is given.
preload.py: what a fork server imports ahead. Nothing outside this package imports DeepSpeed or reads an attribute of
its own (tests/train/test_one_door.py); that it starts the processes (train/pretrain.py) is another matter.
"""
