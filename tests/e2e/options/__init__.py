"""Every option set once in every training mode: it acts, or it is refused by name."""
