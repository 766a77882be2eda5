"""What a request asks for: bodies as clients send them, orders as the engine takes them."""
