"""One pass over the layers: batches, embedding, attention, captured decoding."""
