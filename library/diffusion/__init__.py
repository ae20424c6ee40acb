"""Diffusion maths: tensors in, tensors out; no files, no logging, no global random state."""
