"""Checkpoints as they lie on disk: logical tensors in safetensors, two JSON files, and a hash of every file.

    RUN/checkpoints/step-000100/SHA256SUMS     "<sha256>  <file>" of every other file: `sha256sum -c`  (integrity.py)
                                state.json     what a checkpoint knows beside its tensors           (state.py)
                                index.json     which piece of which logical tensor lies where        (pieces.py)
                                weight-00003-of-00004.safetensors, and what the optimizer keeps      (pieces.py)
    RUN/checkpoints/latest                     the newest complete one, and the hash of its SHA256SUMS  (folders.py)

integrity.py holds these tables together, and names what is damaged. Offline, a chunk of a tensor in memory at a time:
compare.py looks into checkpoints, rewrite.py makes others of them, both by chunks.py. All of these know no torch.
A run is written by save.py, and read by load.py, in any layout: with torch.

Nothing of the layout is in it but the cuts between the pieces, which no reader needs to know. No pickle.
"""
