"""An HTTP server in OpenAI's protocol over the engine: what clients send, and what they get."""
