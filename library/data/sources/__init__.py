"""Plugin folder: each module offers `scan(subset, *, report)`, which yields the image records of one subset."""
