"""What the evaluation tasks of configs/tasks ask, and how their answers are scored."""
