"""The parts of `python tools/train_tiny.py`: the task, the training, and the model card."""
