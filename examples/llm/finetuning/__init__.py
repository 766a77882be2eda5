"""Fine-tuning: rows of a file, what is learned of them, the trainer, and the adapter it leaves."""
