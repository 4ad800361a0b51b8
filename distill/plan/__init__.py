"""What a run will take, before anything is spent: memory, bytes on the wire, hours and money.

devices.py   the table of devices, and what is assumed of all that cannot be read or measured
corpus.py    how many sentences there are, and how long they are: counted, read off the text, or assumed
encoders.py  what a name stands for: a folder's config.json, the table of known encoders
shapes.py    the teacher and the stages' tasks without their weights: parameters, operations, activations
memory.py    bytes that a rank holds, by category, for each ZeRO stage
wire.py      bytes that a rank's collectives carry in a step, and the links they take
time.py      seconds of a step and of a stage
plan.py      all of it put together, and what to set;  table.py, figures.py  the same for people, as JSON
calibrate.py the real step on this machine, for a minute, so that rates are measured and not assumed

Every formula is of what DeepSpeed does, not of what the papers say it could: tests/plan holds each of them against a real step.
"""
