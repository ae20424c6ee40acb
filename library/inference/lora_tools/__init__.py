"""Tools that merge, extract, resize and look at LoRA files, one module of a model at a time."""
