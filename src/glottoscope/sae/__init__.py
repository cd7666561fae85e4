"""TopK sparse autoencoders: the model, its exact training step, the trainer, reconstruction quality, and the stream.

- `model`: `TopKSAE` (encode, decode, save, load) and `geometric_median`.
- `kernels`: one training step's loss and exact gradients; replaceable by name without touching the trainer.
- `trainer`: `SAETrainer` (the paper's recipe).
- `quality`: `QualityAccumulator` (fraction of variance unexplained, cosine, L0).
- `stream`: `ShuffledActivations` (one LM pass feeds every layer's trainers).

Import from the modules; nothing is re-exported here, so that importing the package stays light.
"""
