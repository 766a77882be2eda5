"""Files of requests, as OpenAI's batches are written: each line is answered once."""
