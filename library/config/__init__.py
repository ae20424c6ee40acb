"""Options of every entry point: pydantic groups, argparse surface, TOML files, cross-field rules (floor 0)."""
