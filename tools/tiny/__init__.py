"""The embedded tiny SDXL: its drawn world, its training and its packed file."""
