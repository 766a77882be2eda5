"""What a device's layers are computed with, of one device or several."""
