"""Who may ask, decided before anything else is."""
