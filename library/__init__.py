"""SDXL training suite: see docs/ for the architecture; floors import downward only."""
