"""What each parameter of a module is made of: names of a checkpoint against those of a module."""
