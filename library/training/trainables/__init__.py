"""One file per training mode; each holds one `Trainable`."""
