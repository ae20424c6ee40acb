"""Bytes on disk: images, checkpoints, caches, hashes and the metadata written into them."""
