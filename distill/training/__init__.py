"""One training stage: steps of one global batch each, over all ranks, from the first or from the last checkpoint.

distributed.py   what ranks say to each other, wrapped once
batches.py       a step's rows, dealt to this rank and tokenized ahead of time
engine.py        DeepSpeed: ZeRO, precision, parameter groups, the learning rate of a step;  zero.py  where its JSON lies
recipe.py        what differs between stages: the module whose forward is the loss, and its data
ckd.py, contrast.py, hpd.py     each stage's own: distillation; simcse and finetune; compression
rows.py          what contrast.py reads: triplets, given or mined (mining.py), or sentences
loop.py          step, log, dev evaluation, checkpoint
stopping.py      a wish to stop, obeyed by all ranks after the same step
watch.py         which ranks still live, and who says what happened when a collective has failed
checkpoint.py    complete or absent, written in the background, verified before it is opened
fragments.py     what a rank holds of parameters and optimizer, to files and back, for any world size and ZeRO stage
dev.py           fidelity and STS of the student as it is, on all ranks together
metrics.py       TensorBoard, every step once
dashboard.py     what its pages are told: the layout of the charts, the settings that runs are compared by
instruments.py   what a logged step shows beside its losses; clock.py, floors.py  what that takes
origin.py, projector.py     text about the run, and sentences in both spaces
"""
