"""What a student is trained to do.

    contrast.py   the tiled softmax over keys, and the loss it gives against any target
    ckd.py        hard labels: the teacher's vector of the same sentence (DistilCSE); soft labels (ConGen)
    queue.py      past teacher vectors, first in, first out
    simcse.py     students against each other: triplets, or a sentence under two dropout masks
    hpd.py        the PCA of the teacher as the target of a compact head

Losses are pure functions of tensors; communication happens outside them.
"""
