"""From a LoRA adapter or a merged checkpoint to quantized answers, on the GPUs that are there."""

__version__ = "0.1.0"
