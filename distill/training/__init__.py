"""One training stage: steps of one global batch each, over all ranks, from the first or from the last checkpoint.

distributed.py   what ranks say to each other, wrapped once
batches.py       a step's rows, dealt to this rank and tokenized ahead of time
engine.py        DeepSpeed: ZeRO, precision, parameter groups, the learning rate of a step
recipes.py       what differs between ckd, finetune and hpd: the module whose forward is the loss, and its data
loop.py          step, log, dev evaluation, checkpoint
checkpoint.py    complete or absent, verified before it is opened
dev.py           fidelity and STS of the student as it is, on all ranks together
metrics.py       TensorBoard, every step once
"""
