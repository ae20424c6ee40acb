"""The embedded tiny SDXL: packed weights and their reader."""
