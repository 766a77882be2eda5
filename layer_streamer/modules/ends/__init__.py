"""What a model computes with before and after its blocks, and need not have on the device."""
