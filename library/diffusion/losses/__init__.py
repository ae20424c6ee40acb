"""Plugin folder: one file per elementwise loss, its name is the value of --loss_type."""
