"""Which byte goes where: settings, layout, residency, tiers, the predicted seconds. Pure."""
