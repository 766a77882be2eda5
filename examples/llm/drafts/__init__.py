"""Drafts: tokens that may follow, for the model to agree with or not."""
