"""SDXL's four models: reading, writing, tokens, text conditions, latents, predictions."""
