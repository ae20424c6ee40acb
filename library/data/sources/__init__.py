"""Plugin folder: each module offers `scan(subset, *, report)`, which yields the image records of one subset.

A `scan` that keeps an index of what it read takes `cache_dir` too: the folder for it, None for beside the images.
"""
