"""Names of tensors and modules in single files against the names in diffusers and transformers."""
