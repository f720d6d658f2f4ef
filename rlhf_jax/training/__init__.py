"""Training machinery: state, experience, update and supervised steps, checkpoints, logs."""
