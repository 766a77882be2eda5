"""What is in a checkpoint's files: headers, parsed and bounded, become a manifest."""
