"""The calling thread: it begins passes, takes layers and gives them back."""
