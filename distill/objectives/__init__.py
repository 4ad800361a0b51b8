"""What a student is trained to do: pure functions of tensors; communication happens outside them.

ckd.py                 ckd_loss: student queries against constant teacher keys
key_softmax.py         the tiled softmax over keys, and the loss it gives against any target
scale.py               the scale at which the contrast with the teacher has its minimum at the teacher
queue.py               the queue of past teacher vectors, first in, first out
loss_terms/            the keys of `weights`, one file each
in_batch_contrast.py   students against each other: triplets, or a text under two dropout masks
"""
