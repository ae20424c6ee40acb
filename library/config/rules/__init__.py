"""Rules between options, one file per theme; `library.config.validate` runs them all."""
