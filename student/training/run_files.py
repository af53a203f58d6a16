"""Names of the files that a training writes into its run's folder."""

METRICS = "metrics.jsonl"
RESULT = "train.json"
TENSORBOARD = "tensorboard"
CHECKPOINTS = "checkpoints"
