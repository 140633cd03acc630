"""A small GPT on many ranks: the parts of examples/train_distributed.py."""
