"""OpenVLA as a teacher: native, batched inference on its Hugging Face checkpoints (Kim et al., 2024, arXiv 2406.09246)."""
