"""Training stages: steps of one global batch each, over all ranks, from the first step or from the last checkpoint.

training_stage.py   a stage: assembles a task from the config and runs it
tasks/              the stages, one file each: ckd, finetune, hpd, simcse; an installed package may add others
task.py             what differs between tasks: the module whose forward is the loss, its data, the context of a step
teacher_keys.py     tasks that compare the student's vectors with the teacher's, by objectives/loss_terms (ckd, hpd)
contrast.py         tasks that compare the student's vectors with each other (finetune, simcse)
keys.py             the teacher's vectors of a step and of the queue, which may be sharded over ranks
batches.py          a step's rows: those of this rank, tokenized ahead of time;  encoded_cache.py  vectors of a frozen encoder
samples.py          texts and their translations by number;  mixture.py  their weighted sources, for the order of steps
projection.py       linear maps between the student's and the teacher's space
engine.py           DeepSpeed: its JSON, ZeRO, precision, parameter groups, the learning rate of a step
loop.py             step, log, dev evaluation, checkpoint;  student_store.py  the best student, merged if asked
checkpoint.py       complete or absent, written in the background, verified before it is opened
fragments.py        parameters and optimizer state of a rank, to files and back, for any world size and ZeRO stage
dev_evaluation.py   fidelity and STS of the student in training, on all ranks together
shard_verification.py    the shards are verified before the first step, each once on every node
step_metrics.py     throughput, FLOPs, time and memory of a logged step
tensorboard.py      logs every step once, also after a resume;  dashboard.py  chart layout, texts;  projector.py  embeddings
"""
