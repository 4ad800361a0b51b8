"""Names that the report reads from a run's files: TensorBoard tags and JSON keys."""

# tags of tensorboard/STAGE; those that end with "/" are prefixes
LOSS = "loss"
REFERENCE_LOSS = "reference_loss"
TRAINING_SPEED = "texts_per_second"
DEV_FIDELITY = "dev/fidelity/"
DEV_STS = "dev/sts/"
TEACHER_STS = "teacher/sts/"

# keys of DONE.json, evaluate/results.json, precompute/tasks.jsonl, sessions.jsonl
NUM_TEXTS = "texts"
TEXTS_PER_SECOND = "texts_per_second"
GPU_JOULES = "gpu_joules"

# keys of evaluate/neighbours.json
NEIGHBOUR_TEXT = "text"
NUM_NEIGHBOUR_TEXTS = "texts"
