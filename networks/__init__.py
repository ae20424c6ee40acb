"""Adapter types: the name of a file here is a value of --network_module."""
