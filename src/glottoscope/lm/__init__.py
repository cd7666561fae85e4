"""Language models: checkpoints and where they come from, hidden states of layers, edits of them, losses, pre-training."""
